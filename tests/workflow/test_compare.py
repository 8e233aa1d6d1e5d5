from __future__ import annotations

import csv
import io
import re

import numpy as np
import pytest
from tests.workflow.evaluated import KEYS, empty_project, figures, record, write_run

from diptych.core.errors import ConfigError, DataError
from diptych.core.points import Metric
from diptych.workflow import compare_page, compare_table
from diptych.workflow.compare import compare, direction, method, summary
from diptych.workflow.results import find
from diptych.workflow.spec import PHASES


@pytest.fixture
def project(tmp_path):
    """Three runs: `base`, `good`, which is better throughout, and `odd`, one figure of which was measured otherwise."""
    project = empty_project(tmp_path)
    write_run(project, "base", figures(1, 0.0))
    write_run(project, "good", figures(2, 2.5))
    same, odd = figures(1, 0.0), figures(3, 0.1, templates="sha256:" + "cd" * 32)
    write_run(project, "claims/odd", [odd[0], *same[1:]])
    return project


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("acc1", 1), ("text_to_image_r10", 1), ("mean_per_class", 1), ("acc1.high_rank", 1), ("aupr_in.msp.out", 1), ("log_loss", -1),
        ("log_loss.test.before", -1), ("ece_mass.val.after", -1), ("mce.val.after", -1), ("brier.test.before", -1), ("error_ratio.dark", -1),
        ("fpr95.msp.far", -1), ("text_to_image_median_rank", -1), ("loss_alpha_0.5", -1), ("temperature", 0), ("shape_bias", 0),
    ],
)  # fmt: skip
def test_direction_of_a_metric(metric, expected):
    assert direction(metric) == expected


def test_better_means_lower_where_lower_is_better(project):
    found = compare(project, "base", "good")
    accuracy, loss = found.rows
    assert accuracy.found.test.difference > 0 > loss.found.test.difference
    assert (accuracy.verdict, loss.verdict) == ("better", "better")
    assert loss.examples == (loss.found.test.lower, loss.found.test.equal, loss.found.test.higher)
    assert loss.examples[0] == len(KEYS)
    assert (accuracy.effect[0], loss.effect[0]) == ("h", "d")
    assert [row.key for row in found.sides[0].untested] == ["s/retrieval/median_rank"]
    turned = compare(project, "good", "base")
    assert [row.verdict for row in turned.rows] == ["worse", "worse"]
    assert summary(turned.sides[0]) == "worse on 2 of 2 figures"


def test_a_figure_without_a_better_side_is_higher_or_lower(tmp_path):
    project = empty_project(tmp_path)
    for name, value in (("a", 0.0), ("b", 1.0)):
        values = np.full(len(KEYS), value, np.float32)
        write_run(project, name, [Metric("s", "t", "source_side", value, len(KEYS), 0, 1, {}, KEYS, values)])
    assert compare(project, "a", "b").rows[0].verdict == "higher"
    assert compare(project, "b", "a").rows[0].verdict == "lower"


def test_runs_measured_differently_are_refused_or_the_rest_is_compared(project):
    with pytest.raises(DataError, match="templates differs: ababababab and cdcdcdcdcd"):
        compare(project, "base", "good", "claims/odd")
    found = compare(project, "base", "good", "claims/odd", common=True)
    good, odd = found.sides
    assert [figure.key for figure in odd.figures] == ["s/zero-shot/log_loss"]
    assert [figure.run for figure in found.rows] == ["good", "good", "claims/odd"]
    assert odd.left_out[0].key == "s/zero-shot/acc1"
    assert good.left_out == []
    assert summary(odd) == "no difference shown on 1 of 1 figures; 1 left out"
    assert good.figures[0].found.p_holm == pytest.approx(3 * good.figures[0].found.test.p_value), "one family of three tests"


@pytest.mark.parametrize("names", [["base"], ["base", "base"], ["base", "good", "base"]])
def test_a_comparison_takes_several_runs_each_once(project, names):
    with pytest.raises(ConfigError, match="two runs"):
        compare(project, *names)


def test_what_differs_is_found_behind_phases_taken_over(tmp_path):
    project = empty_project(tmp_path)
    behind = []
    for lr in (1, 2):
        records = {}
        for phase in PHASES:
            records[phase] = record(
                phase, {"seed": 0, phase: {"optimizer": {"lr": lr}, "list": [{"k": 1}]} if phase == "train" else {}}, records
            )
        behind.append(records)
    write_run(project, "w", figures(1, 0), behind[0])
    write_run(project, "w+lr", figures(2, 0), {phase: behind[1][phase] for phase in ("train", "compress", "evaluate")})
    again = record("evaluate", {"seed": 0, "evaluate": {"more": 1}}, behind[1])
    write_run(project, "w+lr+more", figures(2, 0), {"evaluate": again})
    found = compare(project, "w", "w+lr", "w+lr+more")
    assert found.changed == {"train.optimizer.lr": (1, 2, 2), "evaluate.more": ("unset", "unset", 1)}
    assert not [note for note in found.notes if "not known" in note]


def test_doubts_are_noted(project):
    assert any("ingest" in note and "not known" in note for note in compare(project, "base", "good").notes)
    write_run(project, "moved", figures(4, 0.0), dataset="e", code="other", model="base")
    notes = " ".join(compare(project, "base", "moved").notes)
    assert "data sets' digests differ" in notes
    assert "different versions of the code" in notes
    assert "one and the same model" in notes


def test_too_few_resamples_for_so_many_tests_are_noted(project):
    assert not any("too few" in note for note in compare(project, "base", "good", resamples=100).notes)
    for name, lift in (("wide", 0.0), ("wider", 0.5)):
        write_run(project, name, [row for i in range(3) for row in figures(5, lift, name=f"set{i}")])
    assert any("too few for 6 tests" in note for note in compare(project, "wide", "wider", resamples=100).notes)


# ---------------------------------------------------------------- as text, CSV, LaTeX, page


@pytest.fixture
def found(project):
    return compare(project, "base", "good", "claims/odd", common=True, resamples=1000, seed=7)


def test_the_text_says_everything(found):
    text = compare_table.text(found)
    assert "good: better on 2 of 2 figures" in text
    assert "s/retrieval/median_rank" in text
    assert "no test" in text
    assert "s/zero-shot/acc1: templates differs: ababababab and cdcdcdcdcd" in text
    assert "1,000 resamples, seed 7" in text


def test_the_method_is_two_sentences_with_n_and_tests(found):
    text = method(found)
    assert len(re.findall(r"\.(?: |$)", text)) == 2
    assert "n = 60" in text
    assert "all 3 tests" in text


def test_the_csv_holds_every_figure_once_in_full_precision(found):
    rows = list(csv.DictReader(io.StringIO(compare_table.to_csv(found))))
    assert [(row["run"], row["metric"], row["status"]) for row in rows] == [
        ("good", "acc1", "tested"), ("good", "log_loss", "tested"), ("good", "median_rank", "untested"),
        ("claims/odd", "log_loss", "tested"), ("claims/odd", "median_rank", "untested"), ("claims/odd", "acc1", "left out"),
    ]  # fmt: skip
    accuracy = rows[0]
    test = found.rows[0].found.test
    assert [float(accuracy[name]) for name in ("difference", "low", "high", "p", "effect")] == [
        test.difference, test.low, test.high, test.p_value, test.effect,
    ]  # fmt: skip
    assert rows[1]["better_is"] == "lower"
    assert "templates" in rows[-1]["why"]


def test_the_latex_table_is_escaped_and_even(found):
    text = compare_table.to_latex(found)
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:]
    columns = re.search(r"begin{tabular}{(\w+)}", text)[1]
    assert len(body) == 3
    assert all(line.count(" & ") == len(columns) - 1 for line in body)
    assert r"log\_loss$\,\downarrow$" in text
    assert r"\textbf{" in body[0]
    assert not re.search(r"(?<!\\)_(?!\\mathrm)", text.replace("p_\\mathrm", "")), "every underscore outside mathematics is escaped"
    assert "Left out: claims/odd: s/zero-shot/acc1" in text


@pytest.mark.parametrize(("value", "text"), [(0.0, "$<10^{-15}$"), (3.2e-12, r"$3.2\cdot10^{-12}$"), (0.04, "0.04"), (1.0, "1")])
def test_probabilities_in_latex(value, text):
    assert compare_table._latex_probability(value) == text


def test_the_page_stands_alone_and_names_what_was_left_out(found, project, tmp_path):
    path = compare_page.write(found, tmp_path / "deep" / "page.html")
    page = path.read_text()
    assert [each.name for each in path.parent.iterdir()] == ["page.html"]
    for words in ("http://", "https://", "<script"):
        assert words not in page
    for words in ("good and claims/odd against base", "templates differs", "median_rank", "1,000 resamples", "log_loss ↓", "McNemar"):
        assert words in page
    assert page.count("<svg class='forest'") == 2, "shares and losses have axes of their own"
    for run in ("base", "good", "claims/odd"):
        assert f"<td>{run}</td><td>{run}</td>" in page, "run and model digest stand in the table of digests"
    assert find(project, "good").home.exists()


def test_settings_are_shown_by_path_and_by_metric_where_they_differ_within_a_task(tmp_path):
    project = empty_project(tmp_path)
    for name, lift in (("a", 0.0), ("b", 0.5)):
        accuracy, _, _ = figures(1, lift, split="near")
        _, loss, _ = figures(1, lift, split="far", prefix="")
        write_run(project, name, [accuracy, loss])
    page = compare_page.page(compare(project, "a", "b"))
    assert "<td>s / zero-shot: acc1</td><td>preprocessing.resize: bicubic; split: near; templates: ababababab</td>" in page
    assert "<td>s / zero-shot: log_loss</td><td>prefix: none;" in page


def test_names_on_the_page_are_escaped(tmp_path):
    project = empty_project(tmp_path)
    write_run(project, "a", figures(1, 0.0, name="<i>s"))
    write_run(project, "b&c", figures(2, 0.5, name="<i>s"))
    page = compare_page.page(compare(project, "a", "b&c"))
    assert "<i>" not in page
    assert "b&amp;c against a" in page


def test_file_names_hold_the_runs_and_stay_short():
    assert compare_table.default_name(["base", "claims/odd"]) == "base--claims.odd"
    many = [f"claims/a-long-name+{i:06}" for i in range(30)]
    assert len(compare_table.default_name(many)) < 200
    assert compare_table.default_name(many) != compare_table.default_name([*many[:-1], "other"])
