"What tests of `clipcap.scoring` share: the unmodified tools' scores, an environment without Java."
import json
from functools import cache


@cache
def read_vectors(shared) -> dict:
    "Scores of 240 images by the unmodified tools: `corpus`, and `items` by image."
    known = json.loads((shared/"spice/vectors.json").read_text("utf-8"))
    return {**known, "items": {item["image_id"]: item for item in known["items"]}}


def words_of(vectors, number=None):
    "PTB words of the first images: captions and references by image."
    tokens = {i: item["tokens"] for i, item in list(vectors["items"].items())[:number]}
    return {i: t["hypothesis"] for i, t in tokens.items()}, {i: t["references"] for i, t in tokens.items()}


def hide_java(monkeypatch):
    "Let no `java` be on PATH, and any Java speak German."
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de")
    monkeypatch.delenv("JAVA_HOME", raising=False)
