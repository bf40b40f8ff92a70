"""``cakeflow tune``, in this process on a tiny model in a folder."""

import json

import pytest

from cakeflow.cli.command_line import run_command as main
from cakeflow.forward.generation import continuations


@pytest.fixture
def words(lm, workplace):
    """The command on facts that the tiny model states, with 4 of them in each trial."""
    names = ("Ann", "Bob", "Rome", "Oslo", "Kim", "Max", "Tom", "Zoe")
    prompts = [(prompt, name) for prompt in ("The sea of {} is", "The city of {} lies in") for name in names]
    answers = continuations(lm, [prompt.replace("{}", name) for prompt, name in prompts], 8)
    facts = [
        {"prompt": prompt, "subject": name, "target_new": "blue", "target_true": answer.split()[0]}
        for (prompt, name), answer in zip(prompts, answers, strict=True)
        if answer.split()[:1] and answer.split()[0].isalnum()
    ]
    (workplace / "facts.json").write_text(json.dumps(facts))
    options = ["--data", "facts.json", "--edits", "16", "--facts", "4", "--tokens", "640"]
    return ["tune", "model", "mine/tiny.yaml", *options]


def test_the_config_serves_fit(words, workplace, capsys):
    result = main(words)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"alphaedit, {result.trials[1].name}: score {result.trials[1].result}" in printed
    assert "did not reach: " in printed
    assert "on facts that the choice was not made on" in printed
    main(["fit", "--method", "memit", "--model", "mine/tiny.yaml", "--data", "facts.json", "--data.limit", "2"])
    assert "facts learned" in capsys.readouterr().out


def test_a_config_is_replaced_only_on_request(words, workplace, capsys):
    (workplace / "mine").mkdir()
    (workplace / "mine/tiny.yaml").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "mine/tiny.yaml is there already" in capsys.readouterr().err
    assert (workplace / "mine/tiny.yaml").read_text() == "mine"
    main([*words, "--overwrite"])
    assert "layers:" in (workplace / "mine/tiny.yaml").read_text()


@pytest.mark.parametrize(
    ("place", "word", "message"), [(2, "tiny.json", "no YAML file"), (1, "nothing", "nothing"), (8, "1", "facts=1")]
)
def test_bad_input_ends_with_a_message(words, capsys, place, word, message):
    words[place] = word
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
