"""Learn the fit of the demonstration models, which ships beside them.

What rewards the candidates of a segment have is learned from the openings of some reviews::

    python examples/fit_demo.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from training import read_reviews

from stars_fast import StarsEngine, demo, fit


def main() -> None:
    """Learn and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imdb", default="stanfordnlp/imdb", help="JSON lines with `text`, or a hub id")
    parser.add_argument("--count", type=int, default=48, help="openings")
    parser.add_argument("--out", type=Path, default=demo.FOLDER, help="where stars_fit.json goes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    reviews = read_reviews(args.imdb, "train", args.seed)[: args.count]
    openings = [" ".join(text.split()[:6]) for text, _ in reviews]
    policy, reward, tokenizer = demo.load()
    engine = StarsEngine(policy, reward, tokenizer=tokenizer)
    known = fit(engine, openings, top_k=50, seed=args.seed, progress=True)
    known.save_pretrained(args.out)
    print(known.report())


if __name__ == "__main__":
    main()
