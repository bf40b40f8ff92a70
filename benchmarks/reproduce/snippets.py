"""Texts about the new targets of CounterFact records, where the official ``attribute_snippets.json`` is not at hand.

    python benchmarks/reproduce/snippets.py --data counterfact.jsonl.gz --corpus valid.txt test.txt --out FILE

Takes, for every relation and new target, the first sentences of the corpus that name the target, and writes them in the
official file's schema. Consistency against them is not comparable with published numbers: the official texts are the
openings of encyclopedia articles about subjects that have the target as their attribute.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

from cakeflow.data import read_entries, read_texts

MOST = 10
"""Sentences for a target."""


def main() -> None:
    """Search the corpus once."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--corpus", nargs="+", required=True)
    options.add_argument("--out", type=Path, required=True)
    args = options.parse_args()
    rewrites = [entry["requested_rewrite"] for entry in read_entries(args.data)]
    names = {rewrite["target_new"]["str"] for rewrite in rewrites}
    texts: defaultdict[str, list[str]] = defaultdict(list)
    words = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})\b")
    for text in read_texts(args.corpus):
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            for name in set(words.findall(sentence)) if 8 <= len(sentence.split()) <= 80 else ():
                if len(texts[name]) < MOST:
                    texts[name].append(sentence.strip())
    snippets: defaultdict[str, dict[str, list[dict[str, str]]]] = defaultdict(dict)
    for rewrite in rewrites:
        new = rewrite["target_new"]
        snippets[rewrite["relation_id"]][new["id"]] = [{"name": new["str"], "text": text} for text in texts[new["str"]]]
    args.out.write_text(json.dumps(snippets, ensure_ascii=False, indent=1), encoding="utf-8")
    print(
        f"{sum(map(bool, texts.values()))} of {len(names)} targets have texts, {sum(map(len, texts.values()))} in all"
    )


if __name__ == "__main__":
    main()
