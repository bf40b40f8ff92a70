"""What a stream of edits leaves behind: figure 4 (hidden states) and the case study of CAKE's paper.

    python benchmarks/reproduce/aftermath.py --data reconstructed_3000.jsonl.gz --corpus valid.txt test.txt

Every method edits the case study's fact and then the same records, in batches. ``figure4``: hidden states of prompts
about other records, at their last token behind the last edited layer, before and after, put into the plane by t-SNE;
beside it a number that t-SNE cannot distort, the mean relative shift ``|after - before| / |before|``. Case study: what
the model says about the first fact, greedily. Writes ``figure4.png``, ``aftermath.json``, and texts and shifts as
``case.csv`` and ``case.md`` to ``--out``. Interrupted, it goes on with the method where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file
from sklearn.manifold import TSNE
from sweep import Sweep, load, write_table
from torch import Tensor

from cakeflow import EditDataModule, EditRequest
from cakeflow.forward import continuations, pad, plan
from cakeflow.models import LanguageModel, Site, capture
from cakeflow.report import save_plot
from cakeflow.storage import write_tensors, write_text

CASE = EditRequest("{} died in the city of", "Fedele Fischetti", "Paris", "Naples", relation="P20")
ASKED = "The tragic death of Fedele Fischetti occurred in"
METHODS = {
    "MEMIT": "memit", "RECT": "rect", "PRUNE": "prune", "AlphaEdit": "alphaedit", "AlphaEdit_BLUE": "alphaedit_blue",
    "CAKE": "cake_paper",
}  # fmt: skip


@torch.no_grad()
def states(lm: LanguageModel, prompts: list[str], layer: int) -> Tensor:
    """Hidden states behind a layer at each prompt's last token."""
    rows, site = [lm.tokenizer(prompt)["input_ids"] for prompt in prompts], Site(layer)
    hidden = torch.zeros(len(rows), lm.width)
    for group in plan([len(row) for row in rows], 4096):
        ids = pad([rows[i] for i in group], lm.device)
        with capture(lm, [site], stop=True) as seen:
            lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        ends = torch.tensor([len(rows[i]) - 1 for i in group], device=lm.device)
        hidden[group] = seen[site][range(len(group)), ends].float().cpu()
    return hidden


def draw(before: Tensor, after: dict[str, Tensor], path: Path) -> None:
    """A panel per method, both sets of points put into one plane."""
    _, axes = plt.subplots(1, len(after), figsize=(2.6 * len(after), 2.8), squeeze=False, layout="tight")
    for ax, (label, states) in zip(axes[0], after.items(), strict=True):
        plane = TSNE(random_state=0).fit_transform(torch.cat([before, states]).numpy())
        for points, name in ((plane[: len(before)], "before"), (plane[len(before) :], "after")):
            ax.scatter(*points.T, s=3, alpha=0.5, label=name)
        ax.set(title=label, xticks=[], yticks=[])
    axes[0][0].legend(fontsize="x-small")
    save_plot(axes[0][0], path)


def main() -> None:
    """Edit with each method, look, roll back."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m", help="a model config: shipped name, or YAML file")
    options.add_argument("--data", required=True)
    options.add_argument("--corpus", nargs="+", help="texts for the second moments")
    options.add_argument("--tokens", type=int, default=98_304)
    options.add_argument("--records", type=int, default=100, help="edited after the case (paper: 2000)")
    options.add_argument("--batch-size", type=int, default=50)
    options.add_argument("--prompts", type=int, default=300, help="whose hidden states are shown (paper: 1000)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    args = options.parse_args()
    everything = EditDataModule(args.data, shuffle_seed=args.seed, conflicts="drop").requests
    edited, others = everything[: args.records], everything[args.records :][: args.prompts]
    prompts, lm = [record.text for record in others], load(args.model)
    sweep = Sweep([CASE, *edited], args.corpus, args.tokens, None, args.batch_size, lm, args.model)
    layer = sweep.editor("memit", {}).module.layers[-1]
    before, after = states(lm, prompts, layer), {}
    cases = {"unedited": {"case": continuations(lm, [ASKED], 100)[0], "shift": 0.0}}
    given = f"{args.model}, {Path(args.data).name}, {args.records} in batches of {args.batch_size}, seed {args.seed}"
    folder = args.out / "runs" / hashlib.sha256(f"{given}, {args.prompts}".encode()).hexdigest()[:12]
    for label, method in METHODS.items():
        kept = folder / f"{method}.safetensors"
        if not kept.exists():
            editor = sweep.editor(method, {})
            editor.fit(sweep.requests, args.batch_size, evaluate=False)
            text = torch.tensor(list(continuations(lm, [ASKED], 100)[0].encode()))
            write_tensors(kept, {"states": states(lm, prompts, layer), "text": text})
            editor.rollback()
        row = load_file(kept)
        after[label], text = row["states"], bytes(row["text"].tolist()).decode()
        shift = ((after[label] - before).norm(dim=1) / before.norm(dim=1)).mean()
        cases[label] = {"case": text, "shift": float(shift)}
        print(f"{label}: shift {float(shift):.4f}; {ASKED}{text}", flush=True)
    write_text(args.out / "aftermath.json", json.dumps(cases, indent=1, ensure_ascii=False))
    rows = [
        {
            "method": label,
            "text": ASKED + " ".join(row["case"].split("\n")),
            "shift of other prompts": f"{row['shift']:.4f}",
        }
        for label, row in cases.items()
    ]
    write_table(args.out / "case.md", f"{args.model}, {len(sweep.requests)} in batches of {args.batch_size}", rows)
    draw(before, after, args.out / "figure4.png")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
