"""Items of the local tasks, in their files' own fields."""

import json

FILES = {
    "sst2": [{"sentence": f"a {word} film ", "label": label} for word, label in (("dull", 0), ("fine", 1), ("bad", 0))],
    "mrpc": [{"sentence1": "Ann sings.", "sentence2": f"{name} sings.", "label": label, "idx": 3}
             for name, label in (("Ann", 1), ("Bob", 0), ("Zoe", 0))],
    "cola": [{"sentence": text, "label": label}
             for text, label in (("He went.", 1), ("Went he the.", 0), ("We see.", 1))],
    "rte": [{"sentence1": "Rome is old.", "sentence2": f"{name} is old.", "label": label}
            for name, label in (("Rome", 0), ("Oslo", 1), ("Paris", 1))],
    "nli": [{"index": "7", "sentence1": "Rome is old.", "sentence2": f"{name} is old.", "label": label}
            for name, label in (("Rome", "entailment"), ("Oslo", "not_entailment"), ("Paris", "not_entailment"))],
    "mmlu": [{"question": "What is red?", "subject": "colours", "choices": list(order), "answer": order.index("blood")}
             for order in (("blood", "snow", "coal", "grass"), ("snow", "coal", "grass", "blood"),
                           ("snow", "blood", "coal", "grass"))],
}  # fmt: skip


def write(folder, name, entries):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_all(folder):
    """A folder with all of them."""
    for name, entries in FILES.items():
        write(folder, name, entries)
    return folder
