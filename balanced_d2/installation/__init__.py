"""Setting up: stand-alone programs, which import nothing of the package around them."""
