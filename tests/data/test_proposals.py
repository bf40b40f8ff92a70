"""Wordings and neighbors that are proposed for a fact without checks."""

import pytest

from cakeflow import EditRequest, Probe
from cakeflow.data import builtin_facts
from cakeflow.data.builtin import builtin_relations
from cakeflow.data.proposals import FRAMES, NEIGHBORS, propose


def test_a_relation_that_is_known_gives_its_wordings_and_subjects():
    fact = propose(EditRequest("{} plays the sport of", "LeBron James", "tennis"))
    kinds = [probe.kind for probe in fact.probes]
    assert kinds == ["paraphrase"] * 3 + ["neighborhood"] * NEIGHBORS
    assert all("LeBron James" in probe.prompt for probe in fact.probes[:3])
    assert all(probe.prompt.endswith(" plays the sport of") for probe in fact.probes[3:])
    assert not any("LeBron" in probe.prompt for probe in fact.probes[3:])
    assert {probe.expected for probe in fact.probes} == {None}


def test_neighbors_of_a_fact_with_a_true_target_are_subjects_of_that_target():
    (relation,) = (each for each in builtin_relations() if "basketball" in each["targets"])
    fact = EditRequest("{} plays the sport of", "LeBron James", "tennis", "basketball")
    own = {f"{name} plays the sport of" for name in relation["targets"]["basketball"]["subjects"]}
    neighbors = {probe.prompt for probe in propose(fact).probes if probe.kind == "neighborhood"}
    assert neighbors
    assert neighbors < own
    unknown = propose(EditRequest("{} plays the sport of", "LeBron James", "tennis", "curling"))
    assert {probe.kind for probe in unknown.probes} == {"paraphrase"}


def test_every_built_in_fact_finds_its_own_relation():
    for fact in builtin_facts()[:16]:
        bare = propose(EditRequest(fact.prompt, fact.subject, fact.target_new))
        assert {probe.prompt for probe in fact.probes if probe.kind == "paraphrase"} <= {p.prompt for p in bare.probes}


@pytest.mark.parametrize("prompt", ["{} was founded by", "The capital of {} is", "{} was born in the city of", "{} is"])
def test_another_relation_gets_openings_only(prompt):
    fact = propose(EditRequest(prompt, "Google", "Newton"))
    assert [probe.kind for probe in fact.probes] == ["paraphrase"] * len(FRAMES)
    assert all(probe.prompt.lower().endswith(fact.text.lower()) for probe in fact.probes)


def test_capitals_in_the_middle_of_a_sentence():
    texts = [
        propose(EditRequest(p, "Google", "x")).probes[0].prompt for p in ("The capital of {} is", "{} was founded by")
    ]
    assert texts == [f"{FRAMES[0]} the capital of Google is", f"{FRAMES[0]} Google was founded by"]


def test_probes_of_ones_own_stay():
    fact = EditRequest("{} plays", "Ann", "tennis", probes=(Probe("paraphrase", "Ann likes"),))
    assert propose(fact) is fact
