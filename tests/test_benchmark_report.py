"""The report shows every figure of a results file, and the comparison judges ratios, not times."""

from __future__ import annotations

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks import compare, report, results_file
from mova_kernels import MoVAdapterConfig

CASE = "B2-K3-N7-24x24-bf16-forward"
VOID = {"meta", "br", "link", "img"}
FIGURES = ("adapter", "scaling-B", "scaling-K", "scaling-N", "scaling-L", "stages", "roofline", "memory", "errors")

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


def benchmark(variant: str, median: float, suite: str = "adapter", case: str = CASE, **extra) -> dict:
    """One entry as the suites write it, with nothing measured but its time."""
    about = {
        "suite": suite, "case": case, "variant": variant, "kind": "ours" if variant == "ours" else "baseline",
        "plain": variant == "official", "samples": 2, "picks": 3, "experts": 7, "side": 24, "width": 1024,
        "dtype": "bf16", "direction": "forward", "routing": "mixed", "threads": 2, "device": "cpu", "blocks": 1,
        "flop": None, "bytes": None, "exps": None, "tflops": None, "peak_share": None, "roofline_share": None,
        "memory": None, "error": None, "gradient_error": None, "launches": None, "syncs": None, "note": None,
    }  # fmt: skip
    stats = {"median": median, "iqr": median / 50, "q1": median, "q3": median, "min": median, "rounds": 7}
    return {"group": case, "name": f"test[{case}-{variant}]", "stats": stats, "extra_info": about | extra}


def document(*benchmarks: dict, **top) -> dict:
    return {
        "machine_info": {}, "commit_info": {"id": "6703988abcdef", "dirty": True}, "datetime": "2026-11-22T10:00:00",
        "version": "5.3.1", "benchmarks": list(benchmarks), "missing": [],
        "machine": {"name": "AMD EPYC 9B14", "device": "cpu", "threads": 2, "clock_mhz": 2600.0, "peaks": {}},
        "versions": {"torch": "2.13.0", "mova_kernels": "0.4.0"},
    } | top  # fmt: skip


def full() -> dict:
    """Something for every column and every figure."""
    entries = [
        benchmark("official", 1.234, error=3.21e-3, gradient_error=4.56e-3, memory=5 * 2**20),
        benchmark("official + SDPA", 0.617, note="SDPA: flash", launches=11, syncs=3),
        benchmark(
            "ours", 0.3085, flop=12_300_000_000, bytes=45_600_000, exps=789_000, tflops=0.0399, peak_share=0.123,
            roofline_share=0.456, memory=3 * 2**30, error=1.23e-3, gradient_error=2.34e-3,
        ),
    ]  # fmt: skip
    for field, value in (("samples", 2), ("samples", 4), ("picks", 1), ("experts", 16), ("side", 48)):
        entries += [
            benchmark(v, t, "scaling", f"{field}-{value}", **{field: value}) for v, t in (("official", 2), ("ours", 1))
        ]
    entries += [benchmark(v, t, "block", "other", samples=4) for v, t in (("official", 2), ("ours", 1))]
    entries += [
        benchmark(v, t, "rope2d", "official-size", side=48, error=e)
        for v, t, e in (("official", 5e-6, 1e-3), ("ours", 2e-9, 0.0))
    ]
    skipped = {
        "suite": "adapter", "case": CASE, "variant": "flash-attn", "kind": "baseline",
        "outcome": "skipped", "reason": "not installed: <https://example.org>",
    }  # fmt: skip
    failed = skipped | {
        "case": "B64",
        "variant": "ours, cached",
        "kind": "ours",
        "outcome": "failed",
        "reason": "out of memory",
    }
    peaks = {"flops": {"fp32": 2.3e11, "bf16": 4.6e11}, "bandwidth": 3e10, "exps": 2e9}
    machine = {"name": "AMD EPYC 9B14", "device": "cpu", "threads": 2, "clock_mhz": 2600.0, "peaks": peaks}
    return document(*entries, missing=[skipped, failed], machine=machine)


class Page(HTMLParser):
    """The rows of all tables, what is addressed, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.addresses += [value for name, value in attributes if name in ("href", "src", "xlink:href", "data")]
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def row(self, first: str) -> dict[str, str]:
        """The first row that begins so, by the names of its columns."""
        names = next(row for row in self.rows if row[0] == "variant")
        return dict(zip(names, next(row for row in self.rows if row[0] == first), strict=False))


@pytest.fixture
def saved(tmp_path):
    """Write a document, get its path."""

    def save(content: object, name: str = "results.json") -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return save


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The full document's page, and where it is."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("report")
    (folder / "results.json").write_text(json.dumps(full()))
    assert report.main([str(folder / "results.json"), "--output", str(folder / "new")]) == 0
    return (folder / "new" / "report.html").read_text(), folder / "new"


def test_the_table_has_every_figure(reported):
    page = Page(reported[0])
    assert page.row("ours") == {
        "variant": "ours", "median": "308.5 ms", "IQR": "6.17 ms", "over official": "4.00x",
        "over best other baseline": "2.00x", "TFLOP/s": "0.0399", "of matrix peak": "12.3%", "of roofline": "45.6%",
        "peak memory": "3 GiB", "error (official)": "1.23e-03 (3.21e-03)",
        "gradient error (official)": "2.34e-03 (4.56e-03)", "launches": "", "syncs": "", "rounds": "7",
        "needed": "12.3 GFLOP, 45.6 MB, 789 kexp", "note": "",
    }  # fmt: skip
    official, other = page.row("official"), page.row("official + SDPA")
    assert (official["median"], official["over official"], official["peak memory"]) == ("1.234 s", "", "5 MiB")
    assert official["error (official)"] == "3.21e-03"
    assert (other["over official"], other["launches"], other["syncs"]) == ("2.00x", "11", "3")
    assert (other["over best other baseline"], other["note"]) == ("", "SDPA: flash")
    measured = [row for row in page.rows if row[0] in ("official", "official + SDPA", "ours")]
    assert len(measured) == len(full()["benchmarks"])
    assert {row[1] for row in measured} >= {"5 µs", "2 ns"}


def test_what_is_missing_stands_in_the_table_with_its_reason(reported):
    rows = Page(reported[0]).rows
    assert ["flash-attn", "skipped: not installed: <https://example.org>"] in rows
    assert ["ours, cached", "failed: out of memory"] in rows
    assert ["B64"] in rows, "a case of which nothing was measured"


def test_the_page_says_under_which_conditions(reported):
    about = {row[0]: row[1] for row in Page(reported[0]).rows if len(row) == 2}
    assert (about["machine"], about["device"], about["clock"]) == ("AMD EPYC 9B14", "cpu, 2 threads", "2600 MHz")
    assert about["measured peaks"] == "fp32 230 GFLOP/s, bf16 460 GFLOP/s, 30 GB/s, 2 Gexp/s"
    assert about["versions"] == "torch 2.13.0, mova_kernels 0.4.0"
    assert about["commit"].startswith("6703988abcdef (dirty")
    assert about["date"] == "2026-11-22T10:00:00"


def test_the_page_says_what_a_second_run_did_not_confirm(reported, saved, tmp_path):
    about = {row[0]: row[1] for row in Page(reported[0]).rows if len(row) == 2}
    assert about["second run"].startswith("not measured")
    first, second = cases(4.0, 1.0), cases(4.0, 1.2)
    paths = [saved(first, "first.json"), "--again", saved(second, "second.json"), "--output", str(tmp_path)]
    assert report.main(paths) == 0
    about = {row[0]: row[1] for row in Page((tmp_path / "report.html").read_text()).rows if len(row) == 2}
    assert about["second run"] == (
        f"1 of 2 ratios to the official computation within 10%; not adapter, {CASE}, ours (+20%)"
    )


def test_the_page_needs_nothing_else(reported):
    text, folder = reported
    page = Page(text)
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"url\((?!#)|@import", text)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert text.count("<svg") == len(FIGURES) and "Not measured" not in text
    assert {path.name for path in folder.iterdir()} == {"report.html", *(f"{name}.png" for name in FIGURES)}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))


def test_the_same_results_give_the_same_page(reported, saved, tmp_path):
    report.main([saved(full()), "--output", str(tmp_path)])
    assert (tmp_path / "report.html").read_text() == reported[0]


@needs_matplotlib
def test_plots_without_data_are_named(saved, tmp_path):
    """Nothing but two times: the adapter's bars alone can be drawn. What the file does not say is named, too."""
    bare = document(benchmark("official", 2.0), benchmark("ours", 1.0), machine={}, versions={}, commit_info={})
    assert report.main([saved(bare), "--output", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    unmeasured = re.findall(r"<h3>([^<]+)</h3>\n<p>Not measured", text)
    assert unmeasured == [
        "Scaling in B", "Scaling in K", "Scaling in N", "Scaling in L", "Stages", "Roofline", "Peak memory",
        "Error against fp64",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.glob("*.png")] == ["adapter.png"]
    about = {row[0]: row[1] for row in Page(text).rows if len(row) == 2}
    assert about["machine"] == about["clock"] == about["commit"] == "unknown"


def test_a_curve_joins_cases_that_differ_in_one_quantity_alone(saved):
    """Another batch at another size, or in another dtype, belongs to no curve in B; nor does another suite."""
    entries = [
        *(benchmark("ours", b, "scaling", f"B{b}", samples=b) for b in (1, 2, 4)),
        benchmark("ours", 8, "scaling", "B8-12x12", samples=8, side=12),
        benchmark("ours", 16, "scaling", "B16-fp32", samples=16, dtype="fp32"),
        benchmark("ours", 32, "block", "B32", samples=32),
    ]
    loaded = results_file.load(Path(saved(document(*entries))))
    assert [[e.samples for e in family] for family in loaded.families("B")] == [[1, 2, 4]]
    assert not loaded.families("N")


def test_the_official_size_is_the_configuration_of_the_released_models():
    config = MoVAdapterConfig()
    assert results_file.OFFICIAL_SIZE == {"side": config.resolution, "width": config.in_channels}


@needs_matplotlib
def test_picture_has_the_variants_of_one_case(saved, tmp_path, capsys):
    path = tmp_path / "adapter.svg"
    assert report.main([saved(full()), "--picture", str(path)]) == 0
    text = path.read_text()
    assert "</svg>" in text and not (tmp_path / "report.html").exists()
    for words in ("308.5 ms, 4.00x", "1.234 s", "official + SDPA", "2 samples, 3 of 7 experts each", "AMD EPYC 9B14"):
        assert words in text
    assert "flash-attn" not in text
    assert report.main([saved(full()), "--picture", str(path), "--case", "other"]) == 0
    assert "4 samples" in path.read_text()
    assert report.main([saved(full()), "--picture", str(path), "--case", "B64"]) == 2
    assert "B64" in capsys.readouterr().err


def cases(official: float, ours: float, other: float = 3.0, **extra) -> dict:
    """The official computation is not the first, which is what a file without it is judged by."""
    times = {"other": other, "official": official, "ours": ours}
    return document(*(benchmark(variant, time, **extra) for variant, time in times.items()))


@pytest.mark.parametrize(
    "new, arguments, status",
    [
        (cases(4.0, 1.0), [], 0),
        (cases(8.0, 2.0, 6.0), [], 0),  # a slower machine
        (cases(4.0, 1.05), [], 0),
        (cases(4.0, 1.2), [], 1),
        (cases(2.0, 1.0, 3.0), [], 1),  # the official computation got faster, ours did not
        (cases(4.0, 1.2), ["--threshold", "0.25"], 0),
        (cases(4.0, 1.05), ["--threshold", "0.01"], 1),
        (cases(4.0, 1.0, 9.0), [], 0),  # a slower baseline is not ours
        (cases(4.0, 1.0, 9.0), ["--symmetric"], 1),
        (cases(4.0, 0.5), [], 0),  # faster
        (cases(4.0, 0.5), ["--symmetric"], 1),
        (cases(4.0, 0.95, 3.1), ["--symmetric"], 0),
    ],
)
def test_comparison_judges_ratios(saved, new, arguments, status):
    assert compare.main([saved(cases(4.0, 1.0), "old.json"), saved(new, "new.json"), *arguments]) == status


def test_symmetric_mode_does_not_depend_on_the_order_of_the_files(saved):
    """1 / 1.105 is a change of less than ten percent in one direction alone."""
    a, b = saved(cases(4.0, 1.0), "a.json"), saved(cases(4.0, 1.105), "b.json")
    assert compare.main([a, b, "--symmetric"]) == compare.main([b, a, "--symmetric"]) == 1


def test_comparison_prints_ratios_the_worst_first_and_what_only_one_file_has(saved, capsys):
    old, new = cases(4.0, 1.0), cases(5.0, 1.5, 3.0)
    old["benchmarks"].append(benchmark("ours", 1.0, case="gone"))
    new["benchmarks"].append(benchmark("ours", 1.0, case="come"))
    new["missing"] = [{"suite": "adapter", "case": "gone", "variant": "ours", "kind": "ours", "outcome": "failed",
                       "reason": "out of memory"}]  # fmt: skip
    assert compare.main([saved(old, "old.json"), saved(new, "new.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["+20.0%", "0.2500", "0.3000"] and ", ours (" in lines[1]
    assert lines[2].split()[:3] == ["-20.0%", "0.7500", "0.6000"] and ", other (" in lines[2]
    assert re.search(r"only in .*old.json: adapter, gone, ours \(failed: out of memory\)", lines[3])
    assert re.search(r"only in .*new.json: adapter, come, ours", lines[4])


def test_without_the_plain_variant_the_first_common_baseline_is_the_reference(saved, capsys):
    """The second file lacks the official computation: ours over "other" is 1/3, then 2/4."""
    new = document(benchmark("more", 1.0), benchmark("other", 4.0), benchmark("ours", 2.0))
    assert compare.main([saved(cases(4.0, 1.0), "old.json"), saved(new, "new.json")]) == 1
    assert re.search(r"\+50\.0% +0\.3333 +0\.5000 .*ours, over other", capsys.readouterr().out)


def broken(field: str) -> dict:
    content = cases(4.0, 1.0)
    del content["benchmarks"][0]["extra_info"][field]
    return content


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "cannot be read"),
        ("[]", "no benchmarks"),
        (document(), "no benchmarks"),
        (broken("variant"), r"test\[.*other.*variant"),
        (document({"name": "other", "stats": {}}), "other"),
        (document(benchmark("ours", 1.0), benchmark("ours", 2.0)), "twice"),
        (document(benchmark("official", 1.0), benchmark("ours", 2.0, plain=True)), "more than one plain"),
        (document(benchmark("official", 0.0)), "median 0"),
        (document(benchmark("official", 1.0), missing=[{"suite": "adapter"}]), "missing"),
    ],
)
def test_bad_files_are_named(saved, capsys, content, words):
    good, bad = saved(cases(4.0, 1.0), "good.json"), saved(content, "bad.json")
    for arguments in ([good, bad], [bad, good]):
        assert compare.main(arguments) == 2
        error = capsys.readouterr().err
        assert "bad.json" in error and re.search(words, error)


@needs_matplotlib
def test_report_of_an_absent_file(tmp_path, capsys):
    assert report.main([str(tmp_path / "absent.json"), "--output", str(tmp_path)]) == 2
    assert "absent.json" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "new, words",
    [
        (cases(4.0, 1.0, case="another"), "nothing in common"),
        (document(benchmark("official", 4.0)), "nothing in common"),
        (document(benchmark("ours", 4.0)), "nothing in common"),
        (cases(4.0, 1.0, threads=1), "2 threads.*1 threads"),
        (cases(4.0, 1.0, device="cuda", threads=None), "cpu.*cuda"),
    ],
)
def test_files_that_cannot_be_compared(saved, capsys, new, words):
    assert compare.main([saved(cases(4.0, 1.0), "old.json"), saved(new, "new.json")]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_negative_threshold_is_refused(saved, capsys):
    path = saved(cases(4.0, 1.0))
    assert compare.main([path, path, "--threshold", "-0.1"]) == 2
    assert "-0.1" in capsys.readouterr().err
