"""What an endpoint answers in KILT's lines is what an evaluation of the same retriever predicts, page for page."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from small_index import publish_model, serving

from jobs import evaluate
from serve.arguments import ServeArgs
from taskspec.config import Config, with_values
from taskspec.data.prepared import PreparedData
from taskspec.index.build import build_index


def test_served_lines_are_the_predictions_of_an_evaluation(
    tiny_config: Config, tiny_prepared: PreparedData, serve_port: int, tmp_path: Path
) -> None:
    config = with_values(tiny_config, {"index.shards": 3, "index.kind": "flat"})
    model, index, prepared = str(tmp_path / "model"), str(tmp_path / "index"), tiny_prepared.artifact.uri
    publish_model(model, config, seed=0)
    build_index(config, model, prepared, index)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    words = ["--config", str(tmp_path / "config.yaml"), "--checkpoint", model, "--index", index, "--no-bm25"]
    evaluate.run([*words, "--prepared", prepared, "--out", str(tmp_path / "evaluation")])
    args = ServeArgs(checkpoint=model, index=index, threads=1, shard_threads=1)
    with serving(args, serve_port, "predictions") as url:
        for task in config.tasks:
            path = tmp_path / "evaluation" / "predictions" / config.name / f"{task.name}.jsonl"
            predicted = [json.loads(line) for line in path.read_text().splitlines()]
            body = {
                "query": [record["input"] for record in predicted],
                "id": [record["id"] for record in predicted],
                "task": task.name,
                "top_k": config.evaluate.top_k,
                "format": "kilt",
            }
            answer = httpx.post(f"{url}/retrieve", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            served = [json.loads(line) for line in answer.text.splitlines()]
            assert [record["id"] for record in served] == body["id"]
            for one, other in zip(served, predicted, strict=True):
                assert_same_ranking(ranking(one), ranking(other))


def ranking(record: dict[str, Any]) -> list[tuple[str, float]]:
    (output,) = record["output"]
    return [(page["wikipedia_id"], page["score"]) for page in output["provenance"]]


def assert_same_ranking(one: list[tuple[str, float]], other: list[tuple[str, float]]) -> None:
    """The same pages in the same order, but for those whose scores differ by rounding alone: other batches round
    otherwise."""
    scores = [score for _, score in other]
    assert [score for _, score in one] == pytest.approx(scores, abs=1e-6)
    known = dict(other)
    assert [known.get(page, scores[-1]) for page, _ in one] == pytest.approx(scores, abs=1e-6)
