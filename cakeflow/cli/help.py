"""Help pages of one screen: all commands, and the options of ``fit`` and ``evaluate`` that matter."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 80
HELP = ("-h", "--help")
MORE = {
    "method": "or a YAML file",
    "model": "or a folder, a GGUF file or a hub id",
    "targets": "or a YAML file; by default the method's",
    "data": "or a JSON or JSONL file, a URL, a folder, a hub data set",
}
"""Kind of a shipped config -> what else its option takes."""
FIRST = {"method": ("cake", "memit", "alphaedit", "rome", "ft")}
"""Kind of shipped configs that are too many for a page -> those to begin with."""
MAIN = """\
cakeflow edits facts in transformer language models: afterwards the model states
the new fact, and what it says otherwise stays as it was.

usage: cakeflow COMMAND [options]

edit and measure:
  edit       Edit facts given as sentences
  desk       Open a local page to edit facts by hand
  fit        Edit facts in a model
  evaluate   Measure how a model answers requests
look at runs:
  report     Write a report of a run as one HTML page that works offline
  compare    Compare runs
  diff       Compare two runs
  log        Show the ledger of a run
  verify     Verify that nothing in a run folder was changed
  replay     Repeat a run from the unedited model
  reproduce  Search and solve a run anew
  rollback   Take back the last batches of a run
  undo       Take back single facts of a run
take the edited model along:
  export     Export the edited model of a run
  apply      Apply a delta to the model that it was made from
prepare a model:
  tune       Find layers
  statistics Collect second moments ahead of a run
  trace      Measure by causal tracing which layers recall facts
  facts      Write the facts that a model states by itself to a file
more:
  benchmark  Measure many methods on the same facts
  recipes    List the shipped methods
  plugins    List the installed plugins with their kind and package

examples:
  cakeflow edit "LeBron James plays the sport of" "tennis"
  cakeflow fit --method cake --model smollm2-135m --data builtin
  cakeflow report runs/cakeflow/version_0

cakeflow COMMAND --help shows the options of a command, cakeflow --version the
version."""
SHIPPED = """\
  --method NAME   {method}
  --model NAME    {model}
  --targets NAME  {targets}
  --data NAME     {data}"""
FIT = """\
usage: cakeflow fit --method NAME --model NAME --data NAME [options]

Edit facts in a model: search the value that each fact should have, change the
weights of a few layers, measure before and after, and keep all in a run folder.

{shipped}

  --model_config NAME             tuned numbers for the model, or a YAML file
  --config FILE                   YAML with any of these options
  --run_dir FOLDER                run folder; an interrupted run in it goes on
  --from RUN                      finished run to go on from; its edits stay
  --strict                        exit status 1 unless every fact was learned
  --data.limit N                  edit the first N facts only
  --data.batch_size N             facts that are edited together (default: all)
  --model.layers [5,6]            layers to edit, or auto
  --model.rounds N                walk again over facts that did not take
  --model.repairs N               edit facts again that a later batch lost
  --model.dtype TYPE              type of the weights, such as bfloat16
  --model.statistics.source FILE  texts for second moments, or a hub data set
  --model.statistics.tokens N     number of their tokens
  --trainer.accelerator NAME      cpu, gpu, mps or auto
  --trainer.logger NAME           such as TensorBoardLogger (default: CSV)
  --loading.revision NAME         of the model's files; also token, dtype ...
  --import MODULE                 import your own classes, for configs
  --trust_remote_code             run the Python code of the model's folder

examples:
  cakeflow fit --method cake --model smollm2-135m --data builtin
  cakeflow fit --method memit --model gpt2 --model.layers [3,4,5] --data my.json

All options: cakeflow fit --help_all; those of the method: --model.help."""
EDIT = """\
usage: cakeflow edit SENTENCE ANSWER [SENTENCE ANSWER ...] [options]

Edit facts given as sentences, each up to where its answer begins. Subjects are
guessed and shown; wordings and neighbors to check are proposed.

  --subject NAME       subject, where the guess is wrong; of several a list
  --file FILE          facts in a file instead; a subject may be missing there
  --model NAME         embedded name, hub id, folder or GGUF file
  --method NAME        recipe, or a YAML file
  --model_config NAME  tuned numbers for the model, or a YAML file of them
  --layers [5,6]       layers to edit, for a model without tuned numbers
  --run_dir FOLDER     run folder (default: a new one under runs/)
  --from RUN           finished run to go on from; its edits stay
  --dry_run            edit, report and take everything back
  --strict             exit status 1 unless every fact was learned
  --budget FILE        policy for side effects; a run that breaks it is undone
  --loading.revision X of the model's files; also subfolder, token, dtype ...

examples:
  cakeflow edit "LeBron James plays the sport of" "tennis" --dry_run
  cakeflow edit "The capital of France is" "Lyon" --from runs/cakeflow/version_0"""
EVALUATE = """\
usage: cakeflow evaluate --model NAME --data NAME [options]

Measure how a model answers requests, without editing it: how often it states
the new facts, also in other words, and what it says of neighbouring ones.

{shipped}

  --model_config NAME             tuned numbers for the model, or a YAML file
  --config FILE                   YAML with any of these options
  --run_dir FOLDER                folder for answers and metrics
  --data.limit N                  measure the first N facts only
  --data.eval_batch_size N        facts that are asked together
  --model.layers [5,6]            layers, for models without a shipped config
  --model.dtype TYPE              type of the weights, such as bfloat16
  --model.evaluation.protocol X   clean, or official to compare with papers
  --trainer.accelerator NAME      cpu, gpu, mps or auto
  --trainer.logger NAME           such as TensorBoardLogger (default: CSV)
  --loading.revision NAME         of the model's files; also token, dtype ...
  --import MODULE                 import your own classes, for configs
  --trust_remote_code             run the Python code of the model's folder

examples:
  cakeflow evaluate --model smollm2-135m --data builtin
  cakeflow evaluate --model gpt2 --model.layers [3] --data my.json

All options: cakeflow evaluate --help_all; those of the method: --model.help."""
PAGES = {"edit": EDIT, "fit": FIT, "evaluate": EVALUATE}


def page_for(words: Sequence[str]) -> str | None:
    """Return the page that words ask for, or None if they ask for none of these pages.

    Args:
        words: Those after the program's name.
    """
    if not words or (len(words) == 1 and words[0] in HELP):
        return MAIN
    if words[0] in PAGES and set(HELP) & set(words[1:]):
        return PAGES[words[0]].format(shipped=SHIPPED.format(**{kind: _names(kind) for kind in MORE}))
    return None


def _names(kind: str) -> str:
    from cakeflow.core.config import shipped  # takes seconds, which the main page does not need

    names = FIRST.get(kind, tuple(shipped(kind)))
    rest = len(shipped(kind)) - len(names)
    further = f"; {rest} more: cakeflow recipes" if rest else ""
    text = f"{', '.join(names)}{further}; {MORE[kind]}"
    lines = textwrap.wrap(text, WIDTH - 18, break_on_hyphens=False)
    return ("\n" + 18 * " ").join(lines)
