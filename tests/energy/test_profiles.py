"""Counts to joules: the table of profiles, and profiles from YAML."""

from dataclasses import replace

import pytest
import torch

from lightning_msnn.energy.profiles import (
    COLUMN,
    DEFAULT_PROFILE,
    FIELDS,
    KINDS,
    PROFILES,
    Profile,
    energy_by_kind,
    profile,
    unpriced,
)
from lightning_msnn.errors import ConfigurationError


def counts(**amounts):
    """Counts of two layers: the amounts in the first, nothing in the second."""
    table = torch.zeros(2, len(FIELDS), dtype=torch.int64)
    for name, amount in amounts.items():
        table[0, COLUMN[name]] = amount
    return table


def joules(table, on=DEFAULT_PROFILE, parameters=(0, 0), **kwargs):
    return {k: v.sum().item() for k, v in energy_by_kind(table, torch.tensor(parameters), on, **kwargs).items()}


@pytest.mark.parametrize(
    ("name", "multiply_accumulate", "accumulate"),
    [
        ("cmos_45nm", 3.7 + 0.9, 0.9),
        ("cmos_45nm_fp16", 1.1 + 0.4, 0.4),
        ("cmos_45nm_int8", 0.2 + 0.03, 0.03),
        ("cmos_45nm_event", 3.7 + 0.9, 0.9),
    ],
)
def test_horowitz(name, multiply_accumulate, accumulate):
    table = counts(multiply_accumulates=1000, accumulates=2000, neurons=10, membrane_updates=20, omega_operations=30)
    energy = joules(table, name)
    assert energy["multiply-accumulates"] == pytest.approx(1000 * multiply_accumulate * 1e-12)
    assert energy["accumulates"] == pytest.approx(2000 * accumulate * 1e-12)
    assert energy["membranes"] == pytest.approx((10 * accumulate + 20 * multiply_accumulate) * 1e-12)
    assert energy["Omega"] == pytest.approx(30 * multiply_accumulate * 1e-12)
    assert energy["other arithmetic"] == 0
    # By event: 3,000 operations, each with a weight and an accumulator read and written, of 20 pJ for 8 bytes.
    assert energy["memory"] == pytest.approx(3000 * 3 * 4 * 20 / 8 * 1e-12 if name == "cmos_45nm_event" else 0.0)
    assert not unpriced(table, name)


def test_memory():
    table = counts(weights_read=10, values_read=20, values_written=30, spikes_read=40, spikes_written=50)
    assert joules(table)["memory"] == 0
    # 64 bits cost 100 pJ from 1 MB of SRAM and 1.3 nJ from DRAM; a value has 4 bytes, a spike one bit.
    on_chip = 50 * 4 * 100 / 8 + 90 / 8 * 100 / 8
    assert joules(table, "cmos_45nm_sram")["memory"] == pytest.approx((on_chip + 40 * 100 / 8) * 1e-12)
    assert joules(table, "cmos_45nm_dram")["memory"] == pytest.approx((on_chip + 40 * 1300 / 8) * 1e-12)
    half = joules(table, replace(PROFILES["cmos_45nm_fp16"], memory=True))["memory"]
    assert half == pytest.approx((60 * 2 + 90 / 8) * 100 / 8 * 1e-12)


def test_zeros_that_are_skipped_are_not_fetched():
    table = counts(multiply_accumulates=100, effective_multiply_accumulates=40, accumulates=7)
    fetched = [joules(table, "cmos_45nm_event", skip_zeros=skip)["memory"] for skip in (False, True)]
    assert fetched == pytest.approx([n * 3 * 4 * 2.5 * 1e-12 for n in (107, 47)])


def test_chips_say_what_their_source_leaves_out():
    table = counts(accumulates=100, neurons=10, membrane_updates=7, multiply_accumulates=5)
    assert joules(table, "loihi") == pytest.approx(dict.fromkeys(KINDS, 0.0) | {
        "accumulates": 100 * 23.6e-12, "membranes": 10 * 81e-12,
    })  # fmt: skip
    assert unpriced(table, "loihi") == {"multiply_accumulates": 5}
    assert sum(joules(table, "truenorth").values()) == pytest.approx(100 * 26e-12)
    assert unpriced(table, "truenorth") == {"multiply_accumulates": 5}
    assert unpriced(table, "spinnaker2") == {"multiply_accumulates": 5, "neurons": 10, "membrane_updates": 7}
    assert unpriced(counts(), "truenorth") == {}


QUEUE = 4000 / 8192 * 10  # pJ of an access to 1,000 words


def lemaire(table, parameters=0, **kwargs):
    """Picojoules of the first layer; the second does nothing."""
    kinds = energy_by_kind(table, torch.tensor([parameters, 10]), "lemaire", **kwargs)
    assert all(v[1] == 0 for v in kinds.values())
    return {k: v[0].item() * 1e12 for k, v in kinds.items() if v[0] > 0}


def test_lemaire_spiking_by_hand():
    """Two samples of 2,048 weights (8 kB: 10 pJ) and 1,024 potentials (4 kB: 5 pJ), 20 spikes in and 6 out."""
    linear = {"accumulates": 200, "input_spikes": 20, "potentials": 2 * 1024, "spikes": 6}
    accesses = 200 * (10 + 5 + 5) + 20 * QUEUE + 6 * QUEUE + 2 * 1024 * (5 + 5)
    energy = lemaire(counts(**linear, calls=2), 2048)
    # An addition for the address of each synaptic operation.
    assert energy == pytest.approx({"accumulates": 200 * 0.1, "memory": accesses + 200 * 0.1})
    # The spikes of a convolution have two multiply-accumulates beside it.
    energy = lemaire(counts(**linear, calls=2, convolved_spikes=20), 2048)
    assert energy == pytest.approx({"accumulates": 200 * 0.1, "memory": accesses + 200 * 0.1 + 20 * 2 * 3.2})
    # Both samples in two time steps: everything is twice as much, and the memories are as large as before.
    twice = {name: 2 * amount for name, amount in linear.items()}
    energy = lemaire(counts(**twice, calls=4), 2048)
    assert energy == pytest.approx({"accumulates": 400 * 0.1, "memory": 2 * (accesses + 200 * 0.1)})


def test_lemaire_analogue_by_hand():
    """2,048 inputs (8 kB: 10 pJ), 8,192 outputs (32 kB: 20 pJ) and 65,536 weights (256 kB: between 20 and 100 pJ)."""
    layer = {"multiply_accumulates": 100000, "effective_multiply_accumulates": 25000}
    layer |= {"values_read": 2048, "values_written": 8192, "calls": 1}
    weight = 20 + (262144 - 32768) / (1048576 - 32768) * 80
    # A linear layer reads each input once; its addresses are those of 2,048 inputs and 8,192 outputs.
    linear = counts(**layer, input_reads=2048, addresses=2048 + 8192)
    assert lemaire(linear, 65536) == pytest.approx({
        "multiply-accumulates": 100000 * 3.2,
        "memory": 100000 * weight + 2048 * 10 + 8192 * 20 + (2048 + 8192) * 0.1,
    })  # fmt: skip
    # A convolution reads an input for each operation; 32 channels of 3 x 3 weights have addresses too.
    convolution = counts(**layer, input_reads=100000, addresses=2048 + 8192 + 32 * 9)
    assert lemaire(convolution, 65536) == pytest.approx({
        "multiply-accumulates": 100000 * 3.2,
        "memory": 100000 * (weight + 10) + 8192 * 20 + (2048 + 8192 + 32 * 9) * 0.1,
    })  # fmt: skip
    # A quarter of the operations is of values that are not zero: so is a quarter of what they read.
    assert lemaire(convolution, 65536, skip_zeros=True) == pytest.approx({
        "multiply-accumulates": 25000 * 3.2,
        "memory": 25000 * (weight + 10) + 8192 * 20 + (2048 + 8192 + 32 * 9) * 0.1,
    })  # fmt: skip
    # In three time steps everything is three times as much, of one sample too.
    assert lemaire(3 * convolution, 65536) == pytest.approx({k: 3 * v for k, v in lemaire(convolution, 65536).items()})


def test_lemaire_arithmetic_beside_synapses():
    arithmetic = counts(membrane_updates=20, omega_operations=30, multiplications=7)
    assert lemaire(arithmetic) == pytest.approx({"membranes": 20 * 3.2, "Omega": 30 * 3.2, "other arithmetic": 7 * 3.2})


def test_profile_from_yaml(tmp_path):
    path = tmp_path / "chip.yaml"
    path.write_text("chip:\n  source: its data sheet\n  bits: 8\n  prices: {accumulates: 2.5, value_bytes: 1}\n")
    hardware = profile(str(path))
    assert hardware == Profile("its data sheet", {"accumulates": 2.5, "value_bytes": 1}, bits=8, memory=True)
    energy = joules(counts(accumulates=4, values_read=3), hardware)
    assert energy["accumulates"] == pytest.approx(10e-12)
    assert energy["memory"] == pytest.approx(3e-12)


def test_graded_products_take_the_place_of_accumulates():
    prices = {"accumulates": 1.0, "graded_products": 3.0, "fetch_bytes": 1.0}
    graded, binary = {"accumulates": 20, "graded_products": 8, "multiply_accumulates": 5}, {"accumulates": 20}
    for amounts, of_spikes, events in ((graded, 8 * 3.0, 13), (binary, 20 * 1.0, 20)):
        found = joules(counts(**amounts), Profile("its data sheet", prices, bits=8, memory=True))
        assert (found["accumulates"], found["memory"]) == pytest.approx((of_spikes * 1e-12, events * 1e-12))
        assert "graded_products" not in unpriced(counts(**amounts))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chip: {source: x}", "missing 1 required positional argument: 'prices'"),
        ("chip: {source: x, prices: {accumulate: 1}}", "price .*'accumulate'.*did you mean 'accumulates'"),
        ("chip: {source: x, prices: {accumulates: -1}}", "accumulates .* at least 0 pJ, not -1"),
        ("a: [", "defines no energy profile"),
    ],
)
def test_bad_profiles(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        profile(str(path))


def test_unknown_profile():
    with pytest.raises(ConfigurationError, match="unknown energy profile 'loihy'.*did you mean 'loihi'"):
        energy_by_kind(counts(), torch.zeros(2), "loihy")
    with pytest.raises(ConfigurationError, match="'none.yaml' defines no energy profile .*No such file"):
        profile("none.yaml")
