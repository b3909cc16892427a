"""What of a sweep is shown: the table, the picture, and the ratios of benchmarks."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from runner.sweeps.numbers import ratios, read_numbers
from runner.sweeps.paired import Pair, Ratio
from runner.sweeps.picture import draw
from runner.sweeps.table import print_table
from runner.sweeps.view import Line, shown, view

LONG = "path=SmolLM2-135M-Instruct.Q4_1.gguf-1a2b3c,kv_bits={},max_kv_size=1024,adapter=step-1200"


def line(name: str, number: int) -> Line:
    """A point that is a little worse than the one before."""
    difference, stderr = 0.013 * number, 0.0007 * number
    to_first = Pair(
        documents=164,
        left_out=number,
        value_a=0.98,
        value_b=0.98 + difference,
        difference=difference,
        stderr=stderr,
    )
    return Line(
        name=name,
        state="finished",
        numbers={"token_perplexity": 12.34567, "tokens_per_second": 812.4},
        values={
            "nats_per_token": Ratio(value=2.5, stderr=0.1, documents=164),
            "bits_per_byte": Ratio(value=0.98 + difference, stderr=0.021, documents=164),
        },
        to_first={"bits_per_byte": to_first} if number else {},
    )


def failed(name: str) -> Line:
    return Line(name=name, state="failed", numbers={}, values={}, to_first={})


def benchmark(speed: float) -> dict:
    def spread(middle):
        return {"min": middle - 0.1, "median": middle, "max": middle + 0.1}

    peer = {"name": "mlx-lm from pip, 2 rows", "ratio": spread(4.0)}
    ours = {"tokens_per_second": spread(speed)}
    return {"workloads": [{"workload": "decode", "runner": ours, "peers": [peer]}]}


SWEEPS = {
    1: [line("0", 0)],
    2: [line("kv_bits=null", 0), line("kv_bits=4", 1)],
    6: [*(line(LONG.format(bits), bits) for bits in range(5)), failed(LONG.format("x"))],
}


@pytest.mark.parametrize("count", SWEEPS)
def test_the_table_fits_and_names_every_point(count, capsys):
    print_table(view(SWEEPS[count]))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    joined = "".join(printed.split())
    assert all(it.name in joined for it in SWEEPS[count])
    assert ("difference" in printed) == (count > 1) and ("failed" in printed) == (count == 6)
    assert joined.count("12.35") == min(count, 5) and "0.980±0.021" in joined
    assert count == 1 or "+0.01300±0.00070" in joined
    assert "over 164 documents" in " ".join(printed.split())
    assert ("up to 4 left out" in " ".join(printed.split())) == (count == 6)


@pytest.mark.parametrize("count", SWEEPS)
def test_the_picture_shows_every_point_inside_its_frame(count, tmp_path):
    from matplotlib.image import imread

    assert draw(view(SWEEPS[count]), tmp_path) == ["sweep.png", "sweep.svg"]
    image = imread(tmp_path / "sweep.png")[..., :3]
    border = [image[:, :3], image[:, -3:], image[:2], image[-2:]]
    assert all((edge == 1).all() for edge in border), "nothing is cut off"
    colors = {tuple(rgb) for rgb in (image * 255).round().astype(int).reshape(-1, 3)}
    assert (0x00, 0x72, 0xB2) in colors and ((0xD5, 0x5E, 0x00) in colors) == (count > 1)
    ElementTree.parse(tmp_path / "sweep.svg")
    assert image.shape[1] <= 1600 and image.shape[0] <= 1100


def test_a_number_has_the_digits_that_its_error_leaves_it():
    assert shown(0.98123, 0.0213) == "0.981 ± 0.021"
    assert shown(-0.5, 12.3, sign=True) == "-0 ± 12"
    assert shown(0.00289, 0.000334, sign=True) == "+0.00289 ± 0.00033"
    assert shown(1.5, None) == "1.5" and shown(0.0, 0.0, sign=True) == "+0 ± 0"


def test_the_measure_is_one_that_all_points_have():
    other = line("b", 1)
    only = Line(**vars(other) | {"values": {"nats_per_token": other.values["nats_per_token"]}})
    assert view([line("a", 0), other]).columns[0].head == "bits per byte"
    assert view([line("a", 0), only]).columns[0].head == "nats per token"


def test_a_sweep_of_benchmarks_shows_ratios_and_no_pairs(tmp_path: Path, capsys):
    (tmp_path / "benchmark.json").write_text(json.dumps(benchmark(200.0)))
    numbers = read_numbers(tmp_path)
    name = "decode_ratio_mlx-lm_from_pip_2_rows"
    assert numbers == ratios(benchmark(200.0)) == {
        "decode_tokens_per_second": 200.0, name: 4.0, f"{name}_min": 3.9, f"{name}_max": 4.1,
    }  # fmt: skip
    lines = [
        Line(name=f"n={i}", state="finished", numbers=numbers, values={}, to_first={})
        for i in range(2)
    ]
    found = view(lines)
    assert [panel.bars[0] for panel in found.panels] == [(3.9, 4.0, 4.1)]
    print_table(found)
    assert "4.00" in capsys.readouterr().out
    draw(found, tmp_path)


def test_a_job_without_numbers_gets_its_line_and_no_picture(capsys):
    found = view([Line(name="n=1", state="finished", numbers={}, values={}, to_first={})])
    print_table(found)
    assert capsys.readouterr().out.splitlines()[-1] == "  n=1    finished"
    assert not found.panels
