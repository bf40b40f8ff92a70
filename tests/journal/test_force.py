"""Facts in force, against the definition fact by fact."""

from hypothesis import given
from hypothesis import strategies as st

from cakeflow.journal.force import out_of_force

NAMES = st.sampled_from("abcd")
BATCHES = st.lists(st.lists(NAMES, min_size=1, max_size=3, unique=True), max_size=5)


@given(BATCHES, st.data())
def test_a_fact_is_in_force_unless_it_was_taken_back_or_a_later_one_that_was_not_has_replaced_it(hashes, data):
    """The names may come again: a fact that is edited again replaces itself in earlier batches alone."""
    replaced = [data.draw(st.dictionaries(st.sampled_from(names), st.lists(NAMES, max_size=2))) for names in hashes]
    facts = [(number, name) for number, names in enumerate(hashes) for name in names]
    undone = data.draw(st.sets(st.sampled_from(facts))) if facts else set()
    batches = [(number, names, links) for number, (names, links) in enumerate(zip(hashes, replaced, strict=True))]

    def is_gone(number, name):
        later = [(place, new) for place, new in facts if place > number and (place, new) not in undone]
        return (number, name) in undone or any(name in replaced[place].get(new, ()) for place, new in later)

    gone = [{name for name in names if is_gone(number, name)} for number, names in enumerate(hashes)]
    assert out_of_force(batches, undone) == gone
