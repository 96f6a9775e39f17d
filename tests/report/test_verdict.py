"""The verdict on made runs: where the sign is there, and where it is not."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from scipy.stats import ttest_1samp

from blaq.report import rules
from blaq.report.ablation import ablations
from blaq.report.figures import convergence
from blaq.report.page import build
from blaq.report.panels import arrange
from blaq.report.read import read_runs
from blaq.report.signs import broken_off, other_data
from blaq.report.verdict import headline, verdict
from blaq.report.words import MINUS, Statement, difference_text, plain, points
from blaq.train.statistics import Difference

WriteRun = Callable[..., Path]
Make = Callable[..., None]

LAQ = [2.0, 2.1, 1.9]


@pytest.fixture
def make(tmp_path: Path, write_run: WriteRun) -> Make:
    """Writes the seeds of a method, each with its test error."""

    def make_(method: str, errors: Sequence[float], **options: object) -> None:
        for seed, error in enumerate(errors):
            name = "-".join([method, *(str(options[key]) for key in ("a", "bits", "epochs") if key in options)])
            write_run(tmp_path / f"{name}-s{seed}", method=method, seed=seed, test_error=error, **options)

    return make_


def statements(folder: Path) -> list[Statement]:
    (task,) = arrange(read_runs([folder]))
    return [statement for panel in task.panels for statement in verdict(panel, text=task.text)]


def of_tone(folder: Path, tone: str) -> list[str]:
    return [statement.head for statement in statements(folder) if statement.tone == tone]


def test_ahead_beyond_seed_noise(make: Make, tmp_path: Path) -> None:
    make("laq", LAQ)
    make("past", [1.5, 1.62, 1.38])
    (first, *_) = statements(tmp_path)
    assert first.tone == "ahead"
    assert first.head == "Past is ahead of LAQ at equal steps and gradient evaluations, beyond seed noise"
    interval = ttest_1samp([1.5 - 2.0, 1.62 - 2.1, 1.38 - 1.9], 0).confidence_interval(0.95)
    shown = f"-0.50 points (95 % interval {interval.low:.2f} to {interval.high:.2f}, 3 seeds)".replace("-", MINUS)
    assert first.text.startswith(f"Test error {shown}; training loss 0 (the same for 3 seeds, so no interval).")


def test_behind_beyond_seed_noise(make: Make, tmp_path: Path) -> None:
    make("laq", LAQ)
    make("past", [2.5, 2.62, 2.38])
    assert of_tone(tmp_path, "behind") == [
        "Past is behind LAQ at equal steps and gradient evaluations, beyond seed noise"
    ]


def test_a_difference_within_seed_noise_is_none(make: Make, tmp_path: Path) -> None:
    make("laq", LAQ)
    make("past", [1.5, 2.4, 1.7])
    assert of_tone(tmp_path, "level") == [
        "Past and LAQ do not differ beyond seed noise at equal steps and gradient evaluations"
    ]
    assert not of_tone(tmp_path, "ahead")


def test_one_seed_makes_no_claim(make: Make, tmp_path: Path) -> None:
    make("laq", [2.0])
    make("past", [0.1])
    found = statements(tmp_path)
    assert found[0].head == "One seed: no claim about Past and LAQ at equal steps and gradient evaluations"
    assert "--seeds 5" in found[0].advice
    assert {statement.tone for statement in found} == {"note"}


def test_the_same_difference_in_every_seed_is_no_claim(make: Make, tmp_path: Path) -> None:
    make("laq", LAQ, zigzag_rate=0.02)
    for a, down in ((0.6, 0.5), (0.8, 0.6)):
        make("past", [error - down for error in LAQ], a=a, zigzag_rate=0.02)
    first, *others = statements(tmp_path)
    assert first.tone == "note"
    assert first.head == (
        "Past, a = 0.6 and LAQ have the same difference in every seed at equal steps and gradient evaluations: no interval, so "
        "no claim"
    )
    assert first.text.startswith(f"Test error {MINUS}0.50 points (the same for 3 seeds, so no interval)")
    assert not others  # neither "no gain", nor a count of what is ahead by chance
    (task,) = arrange(read_runs([tmp_path]))
    assert headline(task)[0] == (
        "Past against LAQ at equal steps: the same difference in every seed, so no interval at 1 bit (binary)."
    )
    (settings,) = ablations(task.panels[0], "x", text=False)
    assert (
        "1.50 ± 0.10 %, with the same difference in every seed, so no interval, to LAQ's 2.00"
        in (settings.titles["test_error "])
    )


def test_methods_that_give_the_same_do_not_differ(make: Make, tmp_path: Path) -> None:
    make("laq", LAQ)
    make("past", LAQ)
    assert len(of_tone(tmp_path, "level")) == 1


def test_without_laq_it_is_said_what_to_add(make: Make, tmp_path: Path) -> None:
    make("blaq", LAQ)
    make("float", LAQ)
    (found,) = statements(tmp_path)
    assert found.head == "No LAQ run to set BLAQ against"
    assert "--methods laq,blaq" in found.advice


def test_one_method_alone(make: Make, tmp_path: Path) -> None:
    make("laq", LAQ)
    (found,) = statements(tmp_path)
    assert found.head == "LAQ alone: nothing to compare"


def test_seeds_that_do_not_meet(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "a", seed=1)
    write_run(tmp_path / "b", seed=2, method="past")
    found = statements(tmp_path)[0]
    assert found.head.startswith("Past and LAQ share no seed")
    assert found.text == "Past has the seeds 2, LAQ 1."


def test_two_gradients_a_step_are_judged_on_either_axis(make: Make, tmp_path: Path) -> None:
    # BLAQ halves the loss faster a step, but not a gradient: at 60 gradients, LAQ's end, BLAQ is at its 5th epoch.
    laq = [math.exp(-0.3 * epoch) for epoch in range(1, 11)]
    blaq = [math.exp(-0.4 * epoch) for epoch in range(1, 11)]
    make("laq", [2.0, 2.1, 1.9], loss=laq)
    make("blaq", [1.5, 1.61, 1.42], loss=blaq)
    at_steps, at_gradients, *_ = statements(tmp_path)
    assert (at_steps.tone, at_steps.head) == ("ahead", "BLAQ is ahead of LAQ at equal steps, beyond seed noise")
    gap = 20 * (blaq[4] - laq[9])  # validation errors are 20 times the losses
    assert gap > 0
    assert f"Validation error +{gap:.2f} points" in at_gradients.text
    assert "Read off the curves at 60 gradient evaluations" in at_gradients.text
    assert "--budget gradients" in at_gradients.advice


def test_laq_with_as_many_gradients_is_taken_where_it_is(make: Make, tmp_path: Path) -> None:
    make("laq", [2.0, 2.1, 1.9], epochs=10)
    make("laq", [1.0, 1.1, 0.9], epochs=20)
    make("blaq", [1.5, 1.61, 1.38], epochs=10)
    at_steps, at_gradients, *_ = statements(tmp_path)
    assert at_steps.head == "BLAQ is ahead of LAQ, epochs = 10 at equal steps, beyond seed noise"
    assert at_gradients.head == "BLAQ is behind LAQ, epochs = 20 at equal gradient evaluations, beyond seed noise"
    assert at_gradients.text.startswith("Test error +0.50 points") and "Read off" not in at_gradients.text


def test_a_curve_read_off_in_the_middle_of_a_schedule_is_no_finding(make: Make, tmp_path: Path) -> None:
    # Equal gradients: when BLAQ ends, LAQ has half of its schedule before it.
    make("laq", LAQ, epochs=20, schedule="cosine", zigzag_rate=0.02, loss=[1 - 0.02 * epoch for epoch in range(20)])
    for a in (0.6, 0.7):
        losses = [1 - 0.02 * epoch for epoch in range(10)]
        make("blaq", [2.5, 2.61, 2.38], a=a, epochs=10, schedule="cosine", zigzag_rate=0.02, loss=losses)
    at_gradients, at_steps, *others = statements(tmp_path)
    head = "BLAQ, a = 0.6 is behind LAQ at equal gradient evaluations, beyond seed noise"
    assert (at_gradients.tone, at_gradients.head) == ("behind", head)
    assert at_steps.tone == "note"
    assert at_steps.head == "BLAQ, a = 0.6 and LAQ at equal steps: read off before LAQ's schedule ended"
    assert "The learning rate of the longer ones had not finished its schedule there." in at_steps.text
    assert [other.head for other in others] == [
        "Of 2 settings 0 are ahead of LAQ at equal gradient evaluations and 2 behind"
    ]
    (task,) = arrange(read_runs([tmp_path]))
    assert headline(task)[0] == (
        "BLAQ against LAQ at equal steps: read off before LAQ's schedule ended at 1 bit (binary)."
    )
    titles = convergence(task.panels[0], "c", text=False).titles
    assert titles["validation_error steps"] == (
        "Validation error against LAQ at equal steps: BLAQ, a = 0.6 read off before LAQ's schedule ended"
    )


def test_whichever_is_longer_is_read_off(make: Make, tmp_path: Path) -> None:
    for method in ("laq", "blaq"):
        make(method, LAQ, schedule="exponential", schedule_factor=0.9)
    heads = of_tone(tmp_path, "note")
    assert heads[0] == "BLAQ and LAQ at equal gradient evaluations: read off before BLAQ's schedule ended"


def test_a_of_one_is_no_control_at_equal_gradients(make: Make, tmp_path: Path) -> None:
    make("blaq", LAQ, a=1.0)
    make("blaq", [1.5, 1.62, 1.38], a=0.8)
    heads = [statement.head for statement in statements(tmp_path)]
    assert heads[0] == "BLAQ, a = 0.8 is ahead of BLAQ, a = 1 at equal steps, beyond seed noise"
    assert heads[1].startswith("No LAQ run with one gradient a step")


def test_slow_convergence(make: Make, tmp_path: Path) -> None:
    make("laq", LAQ, loss=[math.exp(-0.3 * epoch) for epoch in range(1, 11)])
    make("past", LAQ, loss=[math.exp(-0.1 * epoch) for epoch in range(1, 11)])
    assert "Slow convergence: Past falls behind LAQ from the start" in of_tone(tmp_path, "sign")
    (slow,) = [statement for statement in statements(tmp_path) if statement.head.startswith("Slow")]
    assert "does not come in its whole run to the training loss that LAQ has at half of its run" in slow.text
    assert "0.6 to 0.875" in slow.advice


def test_no_slow_convergence(make: Make, tmp_path: Path) -> None:
    make("laq", LAQ, loss=[math.exp(-0.3 * epoch) for epoch in range(1, 11)])
    make("past", LAQ, loss=[math.exp(-0.25 * epoch) for epoch in range(1, 11)])
    assert not of_tone(tmp_path, "sign")


@pytest.mark.parametrize(("last", "shows"), [(0.2, True), (0.11, False)])
def test_divergence(last: float, shows: bool, make: Make, tmp_path: Path) -> None:
    make("laq", LAQ, loss=[0.5, 0.3, 0.2, 0.1, last], epochs=5)
    heads = of_tone(tmp_path, "sign")
    assert ("Divergence: the training loss of LAQ rises at the end" in heads) == shows


@pytest.mark.parametrize(("end", "shows"), [(0.9, True), (0.5, False)])
def test_the_quantization_error_piles_up(end: float, shows: bool, make: Make, tmp_path: Path) -> None:
    errors = [0.4] * 5 + [end] * 5
    make("laq", LAQ, zigzag_rate=0.3, gradient_error=errors)
    heads = of_tone(tmp_path, "sign")
    assert any(head.startswith("The quantization error piles up") for head in heads) == shows


@pytest.mark.parametrize(
    ("laq", "past", "sign"),
    [
        (0.02, 0.02, "No gain of Past over LAQ: little zig-zag to remove"),
        (0.3, 0.1, "No gain of Past over LAQ, though zig-zag fell"),
        (0.3, 0.29, "No gain of Past over LAQ, and zig-zag hardly fell"),
    ],
)
def test_no_gain(laq: float, past: float, sign: str, make: Make, tmp_path: Path) -> None:
    make("laq", LAQ, zigzag_rate=laq)
    make("past", [2.1, 1.9, 2.0], zigzag_rate=past)
    assert of_tone(tmp_path, "sign") == [sign]


def test_momentum_hides_what_the_gradients_show(make: Make, tmp_path: Path) -> None:
    make("laq", LAQ, zigzag_rate=0.0, gradient_cosine=-0.4)
    make("past", [2.1, 1.9, 2.0], zigzag_rate=0.0, gradient_cosine=-0.1)
    (sign,) = [statement for statement in statements(tmp_path) if statement.tone == "sign"]
    assert sign.head == "No gain of Past over LAQ, though zig-zag fell"
    assert f"the cosine of its successive gradients is {MINUS}0.40; 0.0 % of Past's updates turn back" in sign.text


@pytest.mark.parametrize("method", ["bwn", "delayed"])
def test_methods_that_do_not_look_ahead_have_no_step_back_to_blame(method: str, make: Make, tmp_path: Path) -> None:
    make("laq", LAQ, zigzag_rate=0.02)
    make(method, LAQ, zigzag_rate=0.02, loss=[0.9] * 10)
    assert not of_tone(tmp_path, "sign")


def test_what_looks_ahead_is_spoken_of_first(make: Make, tmp_path: Path) -> None:
    for method in ("bwn", "delayed", "past", "laq", "blaq"):
        make(method, LAQ)
    assert [statement.head.split()[0] for statement in statements(tmp_path) if " and LAQ " in statement.head] == [
        "BLAQ", "BLAQ", "Past", "Delayed", "BWN",
    ]  # fmt: skip


def test_a_gain_is_no_sign_of_failure(make: Make, tmp_path: Path) -> None:
    make("laq", LAQ, zigzag_rate=0.02)
    make("past", [1.5, 1.62, 1.38], zigzag_rate=0.02)
    assert not of_tone(tmp_path, "sign")


def test_no_gain_without_probes_says_how_to_probe(make: Make, tmp_path: Path) -> None:
    make("laq", LAQ)
    make("past", [2.1, 1.9, 2.0])
    (note,) = [statement for statement in statements(tmp_path) if statement.head.startswith("No gain")]
    assert note.tone == "note" and "--set probes.every=10" in note.advice


def test_of_many_settings_validation_chooses_and_chance_is_told(make: Make, tmp_path: Path) -> None:
    make("laq", LAQ)
    for index, a in enumerate((0.5, 0.6, 0.7, 0.8)):
        # Validation prefers a = 0.6, whose test error is not the lowest.
        loss = [0.5] * 9 + [0.2 if a == 0.6 else 0.3]
        make("blaq", [2.0 - 0.5 * (index == 3), 2.12 - 0.5 * (index == 3), 1.88 - 0.5 * (index == 3)], a=a, loss=loss)
    found = statements(tmp_path)
    assert found[0].head == "BLAQ, a = 0.6 and LAQ do not differ beyond seed noise at equal steps"
    assert found[-1].head == "Of 4 settings 1 is ahead of LAQ at equal steps and 0 behind"
    assert "By chance alone about 0.1 would be" in found[-1].text


@pytest.mark.parametrize(("method", "seed"), [("past", 0), ("laq", 7), ("laq", 1)])
def test_a_run_that_stands_alone_speaks_for_no_method(
    method: str, seed: int, make: Make, tmp_path: Path, write_run: WriteRun
) -> None:
    make("laq", LAQ)
    make("past", [1.5, 1.62, 1.38])
    make("float", [1.0, 1.1, 0.9])
    before = [statement.text for statement in statements(tmp_path)]
    write_run(tmp_path / "tried", method=method, seed=seed, lr=0.02, loss=[0.04] * 10)  # of lower validation error
    *found, note = statements(tmp_path)
    assert [statement.text for statement in found if not statement.head.startswith("Of 1 settings")] == before
    assert note.head == "1 setting is passed over for missing, failed or other seeds"
    label = {"past": "Past", "laq": "LAQ"}[method]
    assert note.text.startswith(f"{label}, learning rate = 0.02 (seeds {seed}). ")
    (task,) = arrange(read_runs([tmp_path]))
    (settings,) = ablations(task.panels[0], "x", text=False)
    assert settings.titles["test_error "].startswith(f"Validation data choose {label}, learning rate = 0.01: ")
    assert settings.caption.endswith("Validation chooses among those with the most seeds.")


def test_laq_is_that_with_the_most_seeds_in_common(make: Make, tmp_path: Path, write_run: WriteRun) -> None:
    make("past", [1.5, 1.62, 1.38])
    make("laq", LAQ)
    for seed in range(10, 14):
        write_run(tmp_path / f"other-{seed}", seed=seed, lr=0.02, loss=[0.04] * 10)
    first, *_, note = statements(tmp_path)
    assert first.head.startswith("Past is ahead of LAQ, learning rate = 0.01 at equal steps")
    assert note.text.startswith("LAQ, learning rate = 0.02 (seeds 10, 11, 12, 13). ")


def test_what_quantizing_costs(make: Make, tmp_path: Path) -> None:
    make("float", [1.0, 1.1, 0.9])
    make("laq", [1.5, 1.65, 1.35])
    (found,) = [statement for statement in statements(tmp_path) if "smaller" in statement.head]
    assert found.head == "LAQ weights are 16 times smaller than float32"
    assert "they cost +0.50 points" in found.text


def test_an_end_of_an_interval_reads_as_zero_only_where_it_is() -> None:
    ahead = Difference((-0.12, -0.20, -0.28))  # -0.20 ± 0.1987
    assert ahead.verdict == "lower"
    assert difference_text(ahead, points) == (
        f"{MINUS}0.200 points (95 % interval {MINUS}0.399 to {MINUS}0.001, 3 seeds)"
    )
    losses = Difference((0.1195, 0.2, 0.2805))
    assert losses.verdict == "higher"
    assert difference_text(losses, plain) == "+0.2 (95 % interval +0.00003 to +0.39997, 3 seeds)"
    assert difference_text(Difference((0.004, 0.004)), points) == "+0.004 points (the same for 2 seeds, so no interval)"
    assert difference_text(Difference((0.0,)), points) == "0.00 points (1 seed, so no interval)"


def test_a_finished_run_without_its_metrics_is_not_called_unfinished(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "good")
    (write_run(tmp_path / "lost", seed=1) / "metrics.jsonl").unlink()
    write_run(tmp_path / "cut", seed=2, finished=False)
    (task,) = arrange(read_runs([tmp_path]))
    cut, lost = broken_off(task)
    assert cut.head == "1 run is not finished and left out" and cut.text == "cut (10 of 10 epochs)."
    assert lost.head == "1 run has a result but no metrics and is left out"
    assert lost.text == "lost: metrics.jsonl is missing or empty." and "make the run again" in lost.advice
    assert build(read_runs([tmp_path])).tasks[0].summary == "1 run, 1 seed: LAQ."


def test_metrics_that_every_run_lacks_are_said(tmp_path: Path, write_run: WriteRun) -> None:
    (write_run(tmp_path / "lost") / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"report: 1 run has a result but no metrics and is left out \(lost: "):
        build(read_runs([tmp_path]))


def test_unfinished_runs_and_how_to_go_on(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "good")
    write_run(tmp_path / "cut", seed=1, finished=False)
    write_run(tmp_path / "risen", seed=2, finished=False, epochs=10, loss=[0.5, 0.2, 0.9])
    (task,) = arrange(read_runs([tmp_path]))
    first, second = broken_off(task)
    assert first.head == "2 runs are not finished and left out"
    assert "risen (3 of 10 epochs)" in first.text and "--resume" in first.advice
    assert second.tone == "sign" and "where risen broke off" in second.head


def test_the_headline_gathers_the_panels(make: Make, tmp_path: Path) -> None:
    for bits, errors in ((1, [1.5, 1.62, 1.38]), (2, [2.1, 1.9, 2.0]), (3, [2.5, 2.62, 2.38])):
        make("laq", LAQ, bits=bits)
        make("past", errors, bits=bits)
    (task,) = arrange(read_runs([tmp_path]))
    assert headline(task)[0] == (
        "Past against LAQ at equal steps: ahead at 1 bit (binary); behind at 3 bits (linear3); no difference beyond seed "
        "noise at 2 bits (ternary)."
    )


def test_methods_that_stand_alike_share_a_line(make: Make, tmp_path: Path) -> None:
    for bits in (1, 2):
        make("laq", LAQ, bits=bits)
        make("past", [1.5, 1.62, 1.38], bits=bits)
        make("delayed", [1.5, 1.62, 1.38], bits=bits)
        make("bwn", [2.5, 2.62, 2.38], bits=bits)
    (task,) = arrange(read_runs([tmp_path]))
    places = "1 bit (binary), 2 bits (ternary)"
    assert headline(task)[:2] == [
        f"Past and Delayed against LAQ at equal steps: ahead at {places}.",
        f"BWN against LAQ at equal steps: behind at {places}.",
    ]


def test_nothing_finished_is_an_error(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "a", finished=False)
    with pytest.raises(ValueError, match="no run is finished yet"):
        build(read_runs([tmp_path]))


def test_slower_needs_enough_epochs() -> None:
    assert math.isnan(rules.slower([1, 2, 3], [3, 2, 1], [1, 2, 3], [3, 2, 1]))
    assert rules.slower([1, 2, 3, 4], [9, 9, 9, 9], [1, 2, 3, 4], [4, 3, 2, 1]) == math.inf


def test_growth_needs_enough_probes() -> None:
    assert math.isnan(rules.growth([1, 1, math.nan, 9, 9, 9]))


def test_laq_is_that_of_the_rate_that_validation_chooses(tmp_path: Path, write_run: WriteRun) -> None:
    for rate, error, scale in ((0.0001, 9.0, 3.0), (0.01, 2.0, 1.0)):
        for method in ("float", "laq", "blaq"):
            for seed in range(3):
                loss = [scale * 0.9**epoch for epoch in range(10)]
                own = error + 0.1 * seed + (0.5 if method == "laq" else 0.0)
                write_run(
                    tmp_path / f"{method}-{rate}-{seed}", method=method, seed=seed, test_error=own, loss=loss, lr=rate
                )
    (task,) = arrange(read_runs([tmp_path]))
    (panel,) = task.panels
    cost = next(found for found in verdict(panel, text=False) if "smaller than float32" in found.head)
    assert cost.head.startswith("LAQ, learning rate = 0.01 weights")
    assert "0.50" in cost.text
    titles = [title for figure in ablations(panel, "x", text=False) for title in figure.titles.values()]
    assert not any("9." in title for title in titles)
    assert any("LAQ, learning rate = 0.01's" in title for title in titles)


def test_a_shorter_run_is_not_slow() -> None:
    """It ended before it could have been."""
    laq = [math.exp(-0.1 * epoch) for epoch in range(1, 21)]
    shorter = [math.exp(-0.099 * epoch) for epoch in range(1, 11)]
    assert math.isnan(rules.slower(range(1, 11), shorter, range(1, 21), laq))
    assert rules.slower(range(1, 21), [1.0] * 20, range(1, 21), laq) == math.inf


def test_a_curve_that_begins_after_the_other_ends_is_said(tmp_path: Path, write_run: WriteRun) -> None:
    for seed in range(3):
        for method in ("laq", "blaq"):
            write_run(tmp_path / f"{method}-{seed}", method=method, seed=seed, epochs=1)
    heads = [found.head for found in statements(tmp_path)]
    assert "BLAQ and LAQ cannot be set against each other at equal gradient evaluations" in heads
    assert not any("share no seed" in head for head in heads)


def test_a_loss_that_wavers_near_zero_does_not_diverge(make: Make, tmp_path: Path) -> None:
    make("laq", LAQ, loss=[0.7, 0.1, 0.02, 0.008, 0.0145], epochs=5)  # as the demo's
    assert not of_tone(tmp_path, "sign")


@pytest.mark.parametrize(("method", "advised"), [("past", False), ("blaq", True)])
def test_only_two_gradients_a_step_could_have_been_laqs(method: str, advised: bool, make: Make, tmp_path: Path) -> None:
    make("laq", LAQ, zigzag_rate=0.02)
    make(method, [2.1, 1.9, 2.0], zigzag_rate=0.02)
    (sign,) = [statement for statement in statements(tmp_path) if statement.tone == "sign"]
    assert ("Plain LAQ is the better use of the gradients" in sign.advice) == advised


def test_the_cost_of_quantizing_says_what_it_is_worth(make: Make, tmp_path: Path) -> None:
    make("float", [1.0, 1.1, 0.9], epochs=20)
    make("laq", [1.1, 1.0, 1.0])
    (found,) = [statement for statement in statements(tmp_path) if "smaller" in statement.head]
    assert found.text.endswith("of test error, within seed noise, after 60 steps where float32 took 120.")


def test_settings_of_other_lengths_are_not_judged_in_a_title(make: Make, tmp_path: Path) -> None:
    make("laq", [2.0, 2.1, 1.9], epochs=20)
    for a in (0.6, 0.8):
        make("past", [1.5, 1.61, 1.38], a=a, epochs=10)
    (task,) = arrange(read_runs([tmp_path]))
    titles = [title for figure in ablations(task.panels[0], "x", text=False) for title in figure.titles.values()]
    assert titles[0] == (
        "Validation data choose Past, a = 0.6: test error 1.50 ± 0.12 %, beside LAQ's 2.00 ± 0.10 % after 120 steps to 60"
    )


def test_runs_that_saw_other_data_are_named(make: Make, tmp_path: Path) -> None:
    make("laq", LAQ)
    make("past", LAQ)
    (task,) = arrange(read_runs([tmp_path]))
    assert not list(other_data(task))  # of none it is known
    for run in tmp_path.iterdir():
        digest = "b" if run.name in ("past-s1", "past-s2") else "a"
        (run / "data.json").write_text(json.dumps({"train": 300, "digest": digest}))
    (task,) = arrange(read_runs([tmp_path]))
    (found,) = other_data(task)
    assert found.head == "2 runs saw other data under the same settings"
    assert found.text.startswith("past-s1, past-s2: digest b, not a as laq-s0 has.")
    assert found in build(read_runs([tmp_path])).tasks[0].statements
    (tmp_path / "past-s2" / "data.json").write_text(json.dumps({"train": 300}))
    (task,) = arrange(read_runs([tmp_path]))
    assert {found.text.partition(" as ")[0] for found in other_data(task)} == {
        "past-s1: digest b, not a", "past-s2: digest not noted, not a",
    }  # fmt: skip
