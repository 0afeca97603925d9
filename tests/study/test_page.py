from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bsc.errors import UserError
from bsc.study.page import render_study, write_study_page
from bsc.study.plots import MOST_ROWS, forest, variants_drawn
from bsc.study.summary import decimals
from tests.study.made_results import (
    CHOSEN,
    HOSTILE,
    VERDICTS,
    cell,
    claim,
    done,
    every_kind,
    part,
    result,
    way,
)


class Page(HTMLParser):
    """Tags, ids, headings and what would be loaded; every tag that is opened is closed."""

    VOID = ("meta", "link", "br", "img", "path", "use", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            inside = (value or "").startswith(("#", "data:,"))
            if name in ("src", "srcset", "action", "data") or name.startswith("on"):
                self.loads.append(f"{tag} {name}={value}")
            if name in ("href", "xlink:href") and not inside:
                self.loads.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def names(self) -> list[str]:
        return [tag for tag, _ in self.tags]

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]


def shown(page: str) -> str:
    """The text of a page, without style and plots."""
    page = re.sub(r"<(style|svg)\b.*?</\1>", "", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", page).split())


def section(page: str, name: str) -> str:
    """The text of one claim."""
    return shown(page.split(f'id="claim-{name}"')[1].split('class="claim"')[0])


def test_the_page_loads_nothing_and_has_no_script() -> None:
    text = render_study(every_kind())
    page = Page(text)
    assert page.loads == [] and "script" not in page.names()
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none';") and "script-src" not in policy


def test_the_same_result_gives_the_same_bytes() -> None:
    assert render_study(every_kind()) == render_study(every_kind())


def test_ids_are_there_once_and_links_lead_to_them() -> None:
    page = Page(render_study(every_kind()))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    links = [h for h in page.values("href") if h.startswith("#")]
    assert set(links) <= {f"#{i}" for i in ids} and "#claim-less" in links


def test_headings_go_down_one_level_at_a_time_and_headers_of_tables_have_a_scope() -> None:
    page = Page(render_study(every_kind()))
    levels = [int(tag[1]) for tag in page.names() if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    headers = [attrs for tag, attrs in page.tags if tag == "th"]
    assert headers and all(attrs.get("scope") in ("row", "col") for attrs in headers)


def test_every_verdict_is_a_word_and_a_sign_and_is_counted() -> None:
    text = render_study(every_kind())
    verdicts = text.split('id="verdicts"')[1].split("</section>")[0]
    found = re.findall(
        r'<span class="badge ([^"]*)"><b aria-hidden="true">(.)</b>([^<]*)', verdicts
    )
    assert [word for _, _, word in found] == list(VERDICTS)
    assert len({name for name, _, _ in found}) == len({sign for _, sign, _ in found}) == 5
    assert "Of 5 claims, 1 holds, 1 does not hold, 1 is not decided, 1 is of figures" in shown(text)
    one = render_study(result(claim("a", "holds", part()), claim("b", "holds", part())))
    assert "Of 2 claims, 2 hold." in shown(one)


def test_the_table_of_verdicts_has_the_estimate_that_decides() -> None:
    first = part(cell(7.0, 0.1, against=None), bound=None, verdict=None)
    text = shown(render_study(result(claim("a", "holds", first, part()))))
    assert "The claim a is true. ✓ holds -0.0120 (-0.0160 to -0.0080) difference of fvu" in text
    against = part(cell(0.3, 0.1), verdict="does not hold", figure="kl", weighted=True)
    text = shown(render_study(result(claim("a", "does not hold", part(), against))))
    assert "0.30 (0.20 to 0.40) difference of kl, weighted by firings" in text
    text = shown(render_study(every_kind()))
    assert "1.21 to 1.31 (intervals 1.16 to 1.36) ratio of fvu, 2 cells" in text
    assert "12.0 (11.0 to 13.0) dead_share" in text


def test_a_claim_has_its_rule_its_note_and_why_it_is_not_measured() -> None:
    text = section(render_study(every_kind()), "later")
    assert "Why: tuned: judged is not done." in text
    assert "A note of it." in text and "Rule. Holds if every interval lies" in text


def test_cells_have_their_numbers_and_what_would_decide_them() -> None:
    text = section(render_study(every_kind()), "less")
    assert "8 -0.0120 -0.0160 to -0.0080 0.3012 0.3132 0.0056 3 1,280 2 0" in text
    assert "sweep:binary-k8-s0 sweep:continuous-k8-s0" in text
    assert "factor 1.09" in section(render_study(every_kind()), "more")


def test_cells_without_an_estimate_or_an_interval_are_said() -> None:
    page = render_study(every_kind())
    text = section(page, "open")
    assert "0.500 no interval" in text and "16 - no interval - -" in text
    assert "Pairs are left out where" in text and "No coder has this figure." in text
    assert "Pairs are left out where" not in section(page, "less")
    assert page.count("<figure") == 4  # none of the contrast that nothing has


def test_other_ways_of_measuring_are_compared_with_the_verdict() -> None:
    page = render_study(every_kind())
    text = section(page, "less")
    assert "The verdict is the same in 1 of 2 other ways of measuring it." in text
    assert re.search(r"by the loss ✓ holds yes -0.0200 \(-0.0240 to -0.0160\)", text)
    assert re.search(r"at equal bits \u6f22 \? not decided no ", text)
    assert "other way" not in section(page, "more")


def test_ways_of_measuring_what_nothing_is_claimed_of_are_the_same_as_nothing() -> None:
    other = way("by the loss", "shown", cell())
    one = claim("a", "shown", part(bound=None, verdict=None, variants=[other]))
    text = section(render_study(result(one)), "a")
    assert "by the loss • shown -0.0120" in text and "same verdict" not in text


def test_plots_have_words_with_the_numbers_in_them() -> None:
    text = render_study(every_kind())
    alts = re.findall(r'<svg [^>]*role="img" aria-label="([^"]*)"', text)
    assert len(alts) == text.count("<svg") == 4
    assert "k = 8: -0.0120 (-0.0160 to -0.0080); by the loss: -0.0200 (-0.0240" in alts[0]
    assert "claimed to be below 0" in alts[0] and "Ratio of fvu" in alts[1]
    assert "k = 16: no figure" in alts[2]


def test_text_of_others_is_escaped_and_cannot_hide() -> None:
    hostile = part(
        cell(where={HOSTILE: HOSTILE}, coders=[[HOSTILE, HOSTILE]]), words=HOSTILE,
        contrast=HOSTILE, figure=HOSTILE, units=HOSTILE,
        variants=[way(HOSTILE, "holds", cell())],
    )  # fmt: skip
    arm = {HOSTILE: HOSTILE, "lr": HOSTILE, "tried": [[HOSTILE, 0.1]], "edge": True}
    text = render_study(
        result(
            claim("a", "holds", hostile, words=HOSTILE, note=HOSTILE, rule=HOSTILE, why=HOSTILE),
            title=HOSTILE, question=HOSTILE, scale=HOSTILE, name=HOSTILE, at=HOSTILE,
            steps=[done(HOSTILE, HOSTILE, HOSTILE), done(HOSTILE, "choose lr", chosen=[arm])],
            versions={HOSTILE: HOSTILE}, file_sha256=HOSTILE,
        )
    )  # fmt: skip
    page = Page(text)
    assert page.loads == [] and not {"script", "img"} & set(page.names())
    assert not set(text) & set("\u202e\u2028\x00") and "\u27e8U+202E\u27e9" in text
    assert text.count("&lt;script&gt;alert(1)") > 20


def test_steps_have_their_commands_their_state_and_their_time() -> None:
    text = shown(render_study(every_kind()))
    assert "acts bsc cache demo --store stores/acts done 1.6 min" in text
    assert "judged interp waits -" in text and "1 step of 3 is not done yet." in text
    assert "not done yet" not in shown(render_study(result(steps=[done("acts", "cache")])))


def test_what_was_chosen_is_shown_with_what_was_tried() -> None:
    text = render_study(every_kind())
    assert "In 1 of 2 arms it is at the edge of what was tried" in shown(text)
    choices = text.split('class="choices"')[1].split("</table>")[0]
    assert shown(choices.split("<thead>")[1].split("</thead>")[0]).endswith(
        "lr chosen 0.0003 0.001 0.003 remark"
    )
    rows = [shown(row) for row in choices.split("<tbody>")[1].split("<tr>")[1:]]
    assert rows == [
        "binary 8 0.001 0.3333 0.3111 not finite",
        "continuous 8 0.003 0.2999 0.2888 0.2777 at the edge of what was tried",
    ]
    assert re.findall(r"<b>([^<]*)</b>", choices) == ["0.3111", "0.2777"]
    inner = [arm | {"edge": False} for arm in CHOSEN]
    steps = [done("rates", "choose lr", chosen=inner)]
    assert "at the edge" not in shown(render_study(result(steps=steps)))


def test_a_study_without_claims_or_scale_has_a_page() -> None:
    text = shown(render_study(result(scale=None, question="")))
    assert "The study claims nothing." in text and "at the scale" not in text


def test_the_side_that_is_claimed_is_shaded_and_its_bound_is_in_view() -> None:
    for bound, ratio, ends in (
        ("above 0.5", False, [0.5]),
        ("below 0", False, [0.0]),
        ("within 0.1", False, [-0.1, 0.1]),
        ("within 0.25", True, [0.8, 1.25]),
    ):
        (axis,) = forest("a", part(cell(0.9, 0.05), ratio=ratio, bound=bound), "a").figure.axes
        dashed = [
            float(np.atleast_1d(line.get_xdata())[0])
            for line in axis.lines
            if line.get_linestyle() == "--"
        ]
        assert dashed == pytest.approx(ends), bound
        low, high = axis.get_xlim()
        assert low < min(ends) and max(ends) < high
        box = axis.patches[0].get_extents().transformed(axis.transData.inverted())
        assert (box.x0, box.x1) == pytest.approx((
            low if bound.startswith("below") else ends[0],
            high if bound.startswith("above") else ends[-1],
        ))  # fmt: skip
        assert axis.get_xscale() == ("log" if ratio else "linear")


def test_an_interval_far_wider_than_the_others_does_not_squeeze_them() -> None:
    cells = [cell(where={"k": str(k)}) for k in range(9)]
    wide = cell(-0.01, 500.0, where={"k": "9"})
    (axis,) = forest("a", part(*cells, wide), "a").figure.axes
    low, high = axis.get_xlim()
    assert high - low < 0.1
    marks = [line.get_marker() for line in axis.lines]
    assert marks.count("<") == marks.count(">") == 1
    (axis,) = forest("a", part(*cells), "a").figure.axes
    assert not {"<", ">"} & {line.get_marker() for line in axis.lines}


def test_numbers_of_any_size_are_drawn() -> None:
    kinds: list[tuple[float, list[float] | None, bool, str]] = [
        (2e-9, [1.9e-9, 2.1e-9], False, "below 0"), (0.0, [0.0, 0.0], False, "above 0"),
        (0.0, None, False, "below 0"), (1.0, [0.0, 1e300], True, "above 1"),
        (1.0, [1e-200, 1e200], True, "within 0.1"), (2.0, None, True, "above 0"),
    ]  # fmt: skip
    for value, interval, ratio, bound in kinds:
        drawn = forest("a", part(cell(value, interval=interval), ratio=ratio, bound=bound), "a")
        low, high = drawn.figure.axes[0].get_xlim()
        assert low < value < high and len(drawn.alt) < 150
        assert 2 <= sum(low <= t <= high for t in drawn.figure.axes[0].get_xticks()) <= 12
        assert "<svg" in drawn.svg()


def test_arrows_are_explained_where_there_are_some() -> None:
    cells = [cell(where={"k": str(k)}) for k in range(9)]
    wide = part(*cells, cell(-0.01, 500.0, where={"k": "9"}))
    for one, there in ((wide, True), (part(*cells), False)):
        text = section(render_study(result(claim("a", "holds", one))), "a")
        assert ("An arrow is where an interval goes on" in text) == there


def test_a_bound_on_both_sides_says_of_what() -> None:
    text = section(render_study(every_kind()), "more")
    assert "Claimed: within a factor of 1.1." in text
    one = part(bound="within 0.1")
    assert "Claimed: within 0.1 of 0." in section(
        render_study(result(claim("a", "holds", one))), "a"
    )


def test_a_plot_grows_with_its_rows_and_leaves_other_ways_out_where_they_are_too_many() -> None:
    few, many = (part(*[cell(where={"k": str(k)}) for k in range(n)]) for n in (1, 40))
    small, large = (forest("a", p, "a").figure.get_size_inches()[1] for p in (few, many))
    assert small < 1.3 and 8 < large < 12
    ways = [way("another", "holds", *many.cells)]
    assert variants_drawn(few.model_copy(update={"variants": ways}))
    both = many.model_copy(update={"variants": ways})
    assert len(many.cells) * 2 > MOST_ROWS and not variants_drawn(both)
    assert "Other ways of measuring are in their table alone" in section(
        render_study(result(claim("a", "holds", both))), "a"
    )


def test_digits_go_by_the_narrowest_interval() -> None:
    assert decimals([cell(0.5, 0.1), cell(0.5, 0.004)]) == 4
    assert decimals([cell(120.0, 30.0)]) == 0
    assert decimals([cell(None, None)]) == 3


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "study.html"
    write_study_page(every_kind(), path)
    assert path.read_text() == render_study(every_kind())
    assert [p.name for p in tmp_path.iterdir()] == ["study.html"]
    with pytest.raises(UserError, match="cannot be written"):
        write_study_page(every_kind(), tmp_path / "none" / "study.html")
