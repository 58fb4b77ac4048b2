"""What mkdocs.yml cannot say: the pages beside docs/, the files that pages link to, the reference.

Every page of the site has the path that it has in the repository, so that links work in both.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

PAGES = ("README.md", "MODEL_ZOO.md", "CONTRIBUTING.md", "CHANGELOG.md")
# What a page of the reference shows: of packages what they export, of modules what is public.
REFERENCE = {
    "detection": ["balanced_d2.detection"],
    "model_zoo": ["balanced_d2.model_zoo"],
    "config": ["balanced_d2.config", "balanced_d2.config.yaml_config"],
    "layers": ["balanced_d2.layers"],
    "modeling": ["balanced_d2.modeling"],
    "data": ["balanced_d2.data", "balanced_d2.data.loader", "balanced_d2.data.train_samplers"],
    "engine": [
        "balanced_d2.engine",
        "balanced_d2.engine.hooks",
        "balanced_d2.engine.after_evaluation",
        "balanced_d2.engine.averaging",
        "balanced_d2.engine.accumulate",
        "balanced_d2.engine.run_writer",
        "balanced_d2.engine.mlflow",
        "balanced_d2.engine.wandb",
    ],
    "evaluation": ["balanced_d2.evaluation", "balanced_d2.evaluation.thresholds"],
    "analysis": [
        "balanced_d2.analysis.features",
        "balanced_d2.analysis.sampling",
        "balanced_d2.analysis.metrics",
    ],
    "checkpoint": ["balanced_d2.checkpoint", "balanced_d2.utils.errors"],
    "export": ["balanced_d2.export", "balanced_d2.export.run_exported"],
}
# Sphinx's, in docstrings; Markdown has made code of the name.
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>([^<]+)</code>")


def on_files(files, config):
    root = Path(config.config_file_path).parent
    site = Files(moved(file, config) if file.src_dir == config.docs_dir else file for file in files)
    for page in PAGES:
        site.append(File.generated(config, page, abs_src_path=str(root / page)))
    for name, modules in REFERENCE.items():
        content = "\n\n".join([f"# {name}", *(f"::: {module}" for module in modules)])
        site.append(File.generated(config, f"reference/{name}.md", content=content))
    for path in linked_files(root):
        if path not in site.src_uris:
            site.append(File.generated(config, path, abs_src_path=str(root / path)))
    return site


def moved(file, config):
    """A file of docs/ with that folder in its path."""
    path, source = f"docs/{file.src_uri}", file.abs_src_path
    return File.generated(config, path, abs_src_path=source, inclusion=file.inclusion)


def linked_files(root):
    """Paths of all files of the repository that its pages link to."""
    pages = [root / page for page in PAGES]
    for page in [*pages, *root.glob("docs/*.md"), *root.glob("studies/*/README.md")]:
        for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", page.read_text()):
            path = Path(os.path.normpath(page.parent / target))
            if path.is_file():
                yield path.relative_to(root).as_posix()


def on_page_content(html, page, config, files):
    """Links for Sphinx's roles to what is named in full, or is on the same page."""

    def link(role):
        name = role[1].lstrip("~")
        here = re.search(rf'id="(balanced_d2[\w.]*\.{re.escape(name)})"', html)
        identifier = here[1] if here else name
        return f'<autoref identifier="{identifier}" optional><code>{name}</code></autoref>'

    return ROLE.sub(link, html)
