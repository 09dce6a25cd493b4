"""What the site adds to its pages: two files of the repository's root, and lists that follow a sentence directly."""

from pathlib import Path
from typing import Any

from markdown import Extension
from markdown.preprocessors import Preprocessor
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
AFTER_FENCES = 20  # fenced code is taken out by a preprocessor of priority 25
ITEM = "- "


class _ListsAfterText(Preprocessor):
    """A list may follow a line of text without a blank line, as docstrings write it."""

    def run(self, lines: list[str]) -> list[str]:
        """Put a blank line before the first item of every such list."""
        found: list[str] = []
        inside = False
        for line in lines:
            item = line.startswith(ITEM)
            after_blank = not found or not found[-1].strip()
            if item and not inside and not after_blank:
                found.append("")
            inside = item or (inside and (not after_blank or line.startswith(" ") or not line.strip()))
            found.append(line)
        return found


class ListsAfterText(Extension):
    """Registers the preprocessor."""

    def extendMarkdown(self, md: Any) -> None:
        """Run it once fenced code is out of the way."""
        md.preprocessors.register(_ListsAfterText(md), "lists_after_text", AFTER_FENCES)


def on_config(config: Any) -> Any:
    """Read every page, and every docstring, with the extension."""
    config.markdown_extensions.append(ListsAfterText())
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the root's files as pages; their links into docs/ become links beside them."""
    for page, source in FROM_ROOT.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        for other, name in FROM_ROOT.items():
            text = text.replace(f"]({name})", f"]({other})")
        files.append(File.generated(config, page, content=text))
    return files
