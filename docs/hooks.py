"""Puts into the site what mkdocs alone would not: files outside docs/ that pages link to, and formulas as MathML."""

import html
import posixpath
import re
from pathlib import Path

from math_core import LatexError, LatexToMathML
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PLACE = "repository"  # in the site, of files outside docs/
LINK = re.compile(r"\]\(([^)\s#]+)")
FORMULA = re.compile(r'(<(?:span|div) class="arithmatex">)\\([(\[])(.*?)\\[)\]]', re.S)
LANGUAGES = {".yaml": "yaml", ".csv": "text"}  # of files that browsers would save instead of showing them
TEX = LatexToMathML(fancy_error=False)


class FromDocs(Files):
    """Files by their way from docs/; a page beside docs/ links to one of docs/ by way of its parent."""

    def get_file_from_path(self, path: str) -> File | None:
        return super().get_file_from_path(path.removeprefix("../docs/"))


class Listing(File):
    """A page that shows the text of a file."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that pages link to, and those that these link to. What is not there mkdocs tells."""
    found = FromDocs(files)
    pages = list(files.documentation_pages())
    for page in pages:
        for link in LINK.findall(page.content_string):
            uri = posixpath.normpath(posixpath.join(posixpath.dirname(page.src_uri), link))
            source = (ROOT / "docs" / uri).resolve()
            if source.is_file() and source.is_relative_to(ROOT) and found.get_file_from_path(uri) is None:
                file = _linked(config, uri, source)
                found.append(file)
                if file.is_documentation_page():
                    pages.append(file)
    return found


def _linked(config: MkDocsConfig, uri: str, source: Path) -> File:
    place = source.relative_to(ROOT)
    if language := LANGUAGES.get(source.suffix):
        text = f"# {place}\n\n```{language}\n{source.read_text()}\n```\n"
        file = Listing.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV)
    else:
        file = File.generated(config, uri, abs_src_path=str(source), inclusion=InclusionLevel.NOT_IN_NAV)
    ending = place.suffix.replace(".md", "") + ".html" if file.is_documentation_page() else place.suffix
    file.dest_uri = f"{PLACE}/{place.with_suffix(ending).as_posix()}"
    return file


def on_page_content(content: str, page: Page, **_) -> str:
    """Replace TeX by MathML, which browsers show without a script."""

    def mathml(formula: re.Match[str]) -> str:
        opening, bracket, tex = formula.groups()
        try:
            return opening + TEX.convert_with_local_state(html.unescape(tex), displaystyle=bracket == "[")
        except LatexError as error:
            raise PluginError(f"{page.file.src_uri}: {tex.strip()}: {error}") from error

    return FORMULA.sub(mathml, content)
