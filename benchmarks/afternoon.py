"""What a user would write in an afternoon: FastAPI, sentence-transformers and FAISS in one process. For comparison.

    uvicorn benchmarks.afternoon:app     # MODEL and INDEX name a sentence-transformers folder and an index artifact

The same model, vectors, texts and answers as the endpoint's, passages for single queries that nobody has to cut;
nothing else of it.
"""

import json
import os
from pathlib import Path

import faiss
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

from taskspec.data.rows import RowStore

folder = Path(os.environ["INDEX"])
shards = json.loads((folder / "manifest.json").read_text())["facts"]["shards"]
model = SentenceTransformer(os.environ["MODEL"], device="cpu")
index = faiss.IndexFlatIP(model.get_sentence_embedding_dimension())
for shard in shards:
    part = faiss.read_index(str(folder / shard["file"]))
    index.add(part.reconstruct_n(0, part.ntotal))
passages = RowStore(folder / "passages.arrow")
app = FastAPI()


class Request(BaseModel):
    query: str
    task: str
    top_k: int = 10


@app.post("/retrieve")
def retrieve(request: Request) -> dict[str, list[dict[str, object]]]:
    embedding = model.encode([f"{request.task}: {request.query}"], normalize_embeddings=True)
    scores, rows = index.search(embedding, request.top_k)
    found = passages.take(rows[0], ["passage_id", "wikipedia_id", "title"])
    hits = zip(scores[0].tolist(), *found.values(), strict=True)
    return {"hits": [{"score": s, "id": i, "wikipedia_id": w, "title": t} for s, i, w, t in hits]}
