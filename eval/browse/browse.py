"""`bsc browse`: a folder of static pages with every latent of every coder.

index.html                          the coders
coders/<coder>/index.html           table of its latents: sorted, filtered, searched
coders/<coder>/<n>/<latent>.html    page of a latent, read without a script
coders/<coder>/latents.js           columns of the table
coders/<coder>/contexts.js          words of the strongest contexts, for a search in them
pairs/<n>.html, <n>.js              two coders side by side
style.css, table.js, latent.js      of all pages

It opens from the file system and asks for nothing. It is made beside its place and put there whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from bsc.cache.model.hookpoints import modules_of
from bsc.errors import UserError
from bsc.eval.browse.config import BrowseConfig
from bsc.eval.browse.logits import Unembedding, adds_to_the_stream, unembedding
from bsc.eval.browse.pages import POLICY, CoderPages
from bsc.eval.browse.subject import BrowsedCoder, Subject, open_subject
from bsc.eval.browse.tables import latent_table, pair_table, script
from bsc.eval.browse.writing import write_pages, write_text
from bsc.eval.figures.examples import choose_latents
from bsc.eval.report.links import latent_page
from bsc.eval.report.report import environment_of
from bsc.formats import printable
from bsc.progress import console, format_bytes, stage
from bsc.train.run import Run, as_run
from bsc.versions import versions

__all__ = ["Browser", "write_browser"]

_MARKER = "bsc-browser"
"""A file that says that a folder is a browser and may be replaced."""
_MEASURED = 12
"""Pages of each coder that are made before the rest, to say how large the folder will be."""
_BLOCK = 4096
"""Bytes that a file takes at least, and in steps of which it grows."""
_LISTED = 5_000
"""Latents that the page of a coder lists where there is no script."""


class Browser(NamedTuple):
    """What was written."""

    page: Path
    coders: int
    latents: int
    size: int
    """Bytes."""


def write_browser(
    runs: Run | str | Path | Sequence[Run | str | Path],
    config: BrowseConfig | None = None,
    out: str | Path | None = None,
    *,
    store: str | Path | None = None,
    model: str | None = None,
    device: str | None = None,
) -> Browser:
    """Write the pages and say where they are.

    Args:
        runs: one or several evaluated runs, or their folders.
        config: what is shown; None: everything.
        out: folder to write; None: browse in the first run. A browser that is there is replaced.
        store: where the store is now; None: where it was in training.
        model: where the model is now; None: where it was at the capture.
        device: where effects on logits are computed; None: a GPU where there is one.

    Raises:
        UserError: a run is not evaluated, its store or model is not there, the folder is something
            else, or the disk has no room.
    """
    each = [runs] if isinstance(runs, (Run, str, Path)) else runs
    opened = [as_run(run) for run in each]
    if not opened:
        raise UserError("a browser needs at least one run.")
    if len({run.folder.resolve() for run in opened}) < len(opened):
        raise UserError("a run was named twice; name each once.")
    config = config or BrowseConfig()
    shown = Path(out) if out else opened[0].browse_folder
    folder = shown.resolve()
    _check_place(folder)
    subject = open_subject(opened, config, store, model, device)
    made = not folder.parent.exists()
    building = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Of its own name: another process may be writing to the same place.
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        building.chmod(0o777 & ~_umask())
        found = _Writer(subject, config, building / "new", shown).write()
        _put(building, folder)
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"{shown}: the pages cannot be written ({why}).") from None
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
        if made and not folder.exists():
            with contextlib.suppress(OSError):
                folder.parent.rmdir()
    return found._replace(page=shown / "index.html")


def _umask() -> int:
    """What the rights of new folders leave out; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_place(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; name a folder.")
    if inside := next((p for p in folder.parents if (p / _MARKER).exists()), None):
        raise UserError(
            f"--out {folder}: is in the browser {inside}, and would be lost when that is written "
            f"again. Name another folder."
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARKER).exists():
        raise UserError(
            f"--out {folder}: holds something else than a browser, and would be replaced. Name "
            f"another folder."
        )


def _put(building: Path, folder: Path) -> None:
    """Put the new folder in the place of the old one, which goes where the new one was made."""
    old = building / "old"
    if folder.exists():
        folder.rename(old)
    try:
        (building / "new").rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise


class _Writer:
    """Writes a browser into a folder."""

    def __init__(self, subject: Subject, config: BrowseConfig, folder: Path, place: Path) -> None:
        self.subject, self.config, self.folder, self.place = subject, config, folder, place
        self.environment: jinja2.Environment = environment_of("bsc.eval.browse")
        self.environment.filters["latent_page"] = latent_page
        self.pair_places = {
            pair: f"pairs/{i}.html" for i, pair in enumerate(subject.pairs, 1)
        }  # fmt: skip
        self.written = 0
        folder.mkdir()

    def write(self) -> Browser:
        """All of it."""
        here = Path(__file__).parent
        common = (here.parent / "report" / "style.css").read_text()
        self._put("style.css", common + (here / "browse.css").read_text())
        for name in ("table.js", "latent.js"):
            self._put(name, (here / name).read_text())
        self._put(_MARKER, "")
        shown = {c.slug: len(c.shown(self.config.latents)) for c in self.subject.coders}
        total, tables = sum(shown.values()), {}
        known: dict[int, Unembedding | None] = {}
        with stage("pages", total, "latents") as progress:
            for i, coder in enumerate(self.subject.coders):
                pages = CoderPages(
                    self.subject, coder, self.environment, self._direct_path(coder, known),
                    latents=self.config.latents, contexts=self.config.contexts,
                )  # fmt: skip
                if i == 0:
                    self._check_room(pages, total)
                self._coder(pages, progress)
                for partner in pages.partners:
                    tables[coder.slug, partner.coder.slug] = pair_table(
                        (coder.slug, partner.coder.slug), partner.forth
                    )
        for number, (a, b) in enumerate(self.subject.pairs, 1):
            self._pair(number, self.subject.coders[a], self.subject.coders[b], tables)
        self._page(
            "index.html", "index.html.j2", "",
            labels=list(dict.fromkeys(c.of.label for c in self.subject.coders)), total=total,
            all_latents=sum(len(c.counts) for c in self.subject.coders),
            coders=[(c, shown[c.slug]) for c in self.subject.coders], version=versions()["bsc"],
            pairs=[
                (self.subject.coders[a].title, self.subject.coders[b].title, href)
                for (a, b), href in self.pair_places.items()
            ],
        )  # fmt: skip
        return Browser(self.folder, len(self.subject.coders), total, self.written)

    def _direct_path(
        self, coder: BrowsedCoder, known: dict[int, Unembedding | None]
    ) -> Unembedding | None:
        """From a coder to the logits; None where there is none, or a norm stands in between."""
        of, hookpoint = coder.of, coder.planned.hookpoint
        if id(of) not in known:
            known[id(of)] = unembedding(of.lm.model)
        plain = adds_to_the_stream(of.lm.model, modules_of(hookpoint)[1])
        return known[id(of)] if plain else None

    def _check_room(self, pages: CoderPages, total: int) -> None:
        """Say how large the folder will be, and see that it fits the disk."""
        # Of latents that fire: the others take less, of this coder and of those that follow.
        living = set(choose_latents(pages.browsed.counts, _MEASURED))
        some = [pages.page(i) for i in pages.latents if i in living] or [
            pages.page(i) for i in pages.latents[:1]
        ]
        sizes = [len(one.html.encode()) + len(one.words) + 200 for one in some]
        mean = sum(sizes) / max(1, len(sizes))
        on_disk = total * sum(-(-size // _BLOCK) * _BLOCK for size in sizes) / max(1, len(sizes))
        free = shutil.disk_usage(self.folder).free
        console.print(
            f"{self.place}: {total:,} latents, up to {format_bytes(mean)} each, "
            f"{format_bytes(on_disk)} on the disk",
            markup=False,
        )
        if on_disk > 0.95 * free:
            raise UserError(
                f"{self.place}: the pages take up to {format_bytes(on_disk)}, but "
                f"{format_bytes(free)} are free. Show fewer with --latents, --coders or --contexts."
            )

    def _coder(self, pages: CoderPages, progress: Any) -> None:
        coder = pages.browsed
        place = f"coders/{coder.slug}"
        words: dict[int, str] = {}
        for done in write_pages(pages, self.folder / place):
            words |= done.words
            self.written += done.size
            progress.advance(len(done.words), coder.name)
        self._put(f"{place}/latents.js", script("put", coder.slug, latent_table(pages)))
        self._put(
            f"{place}/contexts.js", script("words", coder.slug, [words[i] for i in pages.latents])
        )
        at = self.subject.coders.index(coder)
        living = [i for i in pages.latents if coder.counts[i] > 0]
        living.sort(key=lambda i: (-coder.counts[i], i))
        self._page(
            f"{place}/index.html", "coder.html.j2", "../../", coder=coder,
            living=len(living), listed=living[:_LISTED],
            pairs=[
                (self.subject.coders[b if a == at else a].title, href)
                for (a, b), href in self.pair_places.items() if at in (a, b)
            ],
        )  # fmt: skip

    def _pair(
        self, number: int, a: BrowsedCoder, b: BrowsedCoder, tables: dict[tuple[str, str], Any]
    ) -> None:
        self._page(f"pairs/{number}.html", "pair.html.j2", "../", a=a, b=b, number=number)
        both = (tables[a.slug, b.slug], tables[b.slug, a.slug])
        self._put(f"pairs/{number}.js", "".join(script("pair", one) for one in both))

    def _page(self, place: str, template: str, up: str, **values: Any) -> None:
        page = self.environment.get_template(template).render(policy=POLICY, up=up, **values)
        self._put(place, printable(page, lines=True))

    def _put(self, place: str, text: str) -> None:
        self.written += write_text(self.folder / place, text)
