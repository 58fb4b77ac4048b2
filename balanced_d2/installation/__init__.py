"""Set-up: stand-alone programs that import nothing from the package around them."""
