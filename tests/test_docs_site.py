"""The documentation as a site: make docs."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from balanced_d2 import detection, layers, model_zoo, modeling

from .conftest import ROOT, chromium, wait_for

pytestmark = pytest.mark.slow

# What a browser loads by itself, and by which attribute.
LOADED = {
    "audio": ["src"],
    "embed": ["src"],
    "iframe": ["src"],
    "img": ["src", "srcset"],
    "link": ["href"],
    "object": ["data"],
    "script": ["src"],
    "source": ["src", "srcset"],
    "video": ["src"],
}
# Relations of <link> that a browser does not load.
FOR_PEOPLE = {"canonical", "next", "prev"}


def build(source, output) -> subprocess.CompletedProcess:
    pytest.importorskip("mkdocs", reason="needs the packages of the extra docs")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(
        [*command, "--site-dir", str(output)],
        cwd=source,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    output = tmp_path_factory.mktemp("docs") / "site"
    result = build(ROOT, output)
    assert result.returncode == 0, result.stdout + result.stderr
    return output


class Page(HTMLParser):
    """What a page has and asks for."""

    def __init__(self, path):
        super().__init__()
        self.loaded, self.links, self.ids = [], [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if not FOR_PEOPLE & set((values.get("rel") or "").split()):
            self.loaded += [values[name] for name in LOADED.get(tag, ()) if values.get(name)]


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_there(site, pages):
    names = {path.relative_to(site).as_posix() for path in pages}
    docs = {f"docs/{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    assert names >= docs | {"index.html", "MODEL_ZOO.html", "CONTRIBUTING.html", "CHANGELOG.html"}
    index = (site / "index.html").read_text()
    for name in names - {"404.html"}:
        assert f'href="{name}"' in index, f"{name} is not in the navigation"


def test_nothing_is_loaded_from_elsewhere(site, pages):
    num_loaded = 0
    for path, page in pages.items():
        if path.name == "404.html":  # whose addresses begin at the root of the site
            continue
        for url in page.loaded:
            if not url.startswith("data:"):
                assert not urlsplit(url).netloc, f"{path}: {url}"
                assert (path.parent / unquote(urlsplit(url).path)).is_file(), f"{path}: {url}"
                num_loaded += 1
    assert num_loaded > 100
    for path in site.rglob("*.css"):
        for url in re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')]+)", path.read_text()):
            assert url.startswith(("data:", "#")) or not urlsplit(url).netloc, f"{path}: {url}"


def test_links(site, pages):
    """Every link within the site has its file and its anchor."""
    num_links = 0
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            file = (path.parent / unquote(target.path)).resolve() if target.path else path
            assert file.is_file() and file.is_relative_to(site.resolve()), f"{path}: {link}"
            if target.fragment and file.suffix == ".html" and target.fragment != "__codelineno":
                ids = pages[site / file.relative_to(site.resolve())].ids
                assert unquote(target.fragment) in ids, f"{path}: {link}"
            num_links += 1
    assert num_links > 1000


def test_the_reference(pages):
    """What is public is there, with the text of its docstrings, and no markup of other tools."""
    ids = set().union(*(page.ids for page in pages.values()))
    for package in (detection, layers, model_zoo, modeling):
        for name in package.__all__:
            assert f"{package.__name__}.{name}" in ids
    for name in ("hooks.SeedIterations", "after_evaluation.EarlyStopping", "BalancedTrainer"):
        assert f"balanced_d2.engine.{name}" in ids
    for path in pages:
        if path.parent.name == "reference":
            assert not re.search(r":(class|func|meth|mod|data|attr):", path.read_text()), path
    (text,) = (path.read_text() for path in pages if path.name == "layers.html")
    assert "the mean is refined" in " ".join(text.split())
    assert 'href="#balanced_d2.layers.NonLocal2d"' in text


def test_broken_links_are_errors(tmp_path):
    for name in ("balanced_d2", "configs", "benchmarks", "studies", "notebooks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for path in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml", ROOT / "LICENSE"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "export.md").open("a") as page:
        page.write("\n[a](no_page.md) [b](training.md#no-heading) [c](../configs/no.yaml)\n")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode != 0
    for missing in ("no_page.md", "#no-heading", "configs/no.yaml"):
        assert missing in result.stdout + result.stderr


def test_search_without_a_server(site):
    """In a real browser, on a page that is opened from its folder."""
    with chromium() as browser:
        browser.get((site / "docs" / "training.html").as_uri())
        field = wait_for(lambda: browser.find_elements("css selector", ".md-search__input"))[0]
        browser.execute_script("arguments[0].focus()", field)
        field.send_keys("seesaw")
        found = wait_for(lambda: browser.find_elements("css selector", ".md-search-result__link"))
        links = [link.get_attribute("href") for link in found]
    assert any("imbalance.html" in link for link in links)
    assert all(link.startswith("file://") for link in links)
