"""The prompt files of benchmarks, and the names of the images that their scorers read.

The scorers: github.com/djghosh13/geneval, dpg_bench of github.com/TencentQQGYLab/ELLA,
github.com/OneIG-Bench/OneIG-Benchmark and github.com/A113N-W3I/TIIF-Bench.
"""

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass

from bitdance_jax.errors import FileError, short
from bitdance_jax.evaluate.prompt_files import Prompt
from bitdance_jax.io import readers
from bitdance_jax.io.paths import local


GENEVAL_PROMPTS = 553

ONEIG_FOLDERS = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}
"""The folder of each category of OneIG-Bench."""

ONEIG_PROMPTS = ("prompt_en", "prompt_cn")
"""The column of the prompts in OneIG-Bench.csv and in OneIG-Bench-ZH.csv."""

FOLDER_NAME = re.compile(r"[\w+][\w+.-]{0,99}", re.ASCII)
"""Names of a model and of TIIF-Bench's types; the scorers use them in glob patterns."""


@dataclass(frozen=True)
class GenevalLine:
    """The part of a line that is read here; the scorer reads the rest."""

    prompt: str


@dataclass(frozen=True)
class TiifLine:
    """A line of TIIF-Bench's prompts; its evaluation prompts have further fields."""

    type: str
    short_description: str
    long_description: str


def read_geneval(path: str) -> list[Prompt]:
    """The prompts of a .jsonl with a "prompt" in each line, named 00000, 00001, ...

    Empty lines are ignored.

    Raises:
      FileError: no such file, no prompts in it, or a line without a "prompt".
    """
    prompts: list[Prompt] = []
    # Removes a byte order mark, which the scorer could not read.
    lines = readers.read_text(path, readers.MAX_LIST_BYTES).encode()
    for number, line in enumerate(lines.splitlines(keepends=True), 1):
        where = f"line {number} of {path}"
        if not line.strip():
            continue
        fix = 'a line must be an object with a text "prompt"'
        entry: GenevalLine = readers.decode_json(line, GenevalLine, where=where, fix=fix)
        prompts.append(Prompt(f"{len(prompts):05d}", entry.prompt, where, line))
    if not prompts:
        raise FileError(f"{path} has no prompts", path)
    return prompts


def compare_with_published(prompts: list[Prompt]) -> str:
    """Whether the scores of these prompts can be compared with the published ones."""
    published = "the published scores, 0.86 (14B-16x) and 0.85 (14B-64x),"
    rewritten = f"the {GENEVAL_PROMPTS} rewritten prompts, evaluation_metadata_long.jsonl"
    if all(prompt.text.startswith("a photo of ") for prompt in prompts):
        return f"these are GenEval's original prompts; {published} are for {rewritten}"
    if len(prompts) == GENEVAL_PROMPTS:
        return f"{GENEVAL_PROMPTS} rewritten prompts; {published} are for such prompts"
    return f"{published} are for {rewritten}, and these are {len(prompts)} other prompts"


def read_dpg(path: str) -> list[Prompt]:
    """The prompts of a folder of ID.txt, sorted by name, or of a .json of {id: prompt}.

    Raises:
      FileError: no such file or folder, no prompts or other contents in it, or ids that occur twice
        or cannot be names of files.
    """
    if local(path).is_dir():
        files = sorted(local(path).glob("*.txt"))
        prompts = [Prompt(file.stem, readers.read_text(file).strip(), str(file)) for file in files]
    else:
        data = readers.read_bytes(path, readers.MAX_LIST_BYTES)
        fix = "give DPG-Bench's prompts as {id: prompt}, each id once, or as a folder of ID.txt"
        texts: dict[str, str] = readers.decode_json(
            data, dict[str, str], where=path, fix=fix, unique=True
        )
        prompts = [Prompt(name, text, f"{name!r} of {path}") for name, text in texts.items()]
    if not prompts:
        raise FileError(f"{path} has no prompts", path)
    for name in (prompt.name for prompt in prompts):
        # The scorer reads the id up to the first dot.
        if not re.fullmatch(r"[\w-]{1,200}", name, re.ASCII):
            raise FileError(
                f"{path}: the id {short(name)} cannot be the name of an image; "
                "use letters, digits, _ and -",
                path,
            )
    return prompts


def read_oneig(path: str, model: str) -> list[Prompt]:
    """The prompts of OneIG-Bench.csv or OneIG-Bench-ZH.csv, named CATEGORY'S FOLDER/model/ID.

    Raises:
      FileError: no such file, no prompts in it, a column is missing, or a line has an unknown
        category, an id that is not of three digits, or the category and id of an earlier one.
    """
    text = readers.read_text(path, readers.MAX_LIST_BYTES)
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    prompts: list[Prompt] = []
    try:
        columns = [name for name in ONEIG_PROMPTS if name in (rows.fieldnames or ())]
        if len(columns) != 1 or not {"category", "id"} <= set(rows.fieldnames or ()):
            raise FileError(
                f"{path} must be a .csv with the columns category, id and either "
                f"{' or '.join(ONEIG_PROMPTS)}",
                path,
            )
        for row in rows:
            where = f"line {rows.line_num} of {path}"
            folder = ONEIG_FOLDERS.get(row["category"])
            if folder is None:
                raise FileError(
                    f"{where}: the category {short(row['category'])} is none of "
                    f"{', '.join(ONEIG_FOLDERS)}",
                    path,
                )
            # The scorer takes the first three characters of a file's name.
            if not re.fullmatch(r"\d{3}", row["id"] or "", re.ASCII):
                raise FileError(
                    f"{where}: the id {short(row['id'])} is not of three digits, such as 007", path
                )
            prompts.append(Prompt(f"{folder}/{model}/{row['id']}", row[columns[0]] or "", where))
    except csv.Error as error:
        line = rows.reader.line_num
        raise FileError(f"line {line} of {path} cannot be read: {error}", path) from error
    return _checked(prompts, path)


def read_tiif(path: str, model: str) -> list[Prompt]:
    """The prompts of a .jsonl of TIIF-Bench, or of a folder of them, sorted by name.

    The prompts of line i of a file, from 0, are TYPE/model/short_description/i and
    TYPE/model/long_description/i. Empty lines are ignored.

    Raises:
      FileError: no such file or folder, no prompts in it, a line without the three texts, a type
        that cannot be the name of a folder, or one that occurs in two files.
    """
    is_folder = local(path).is_dir()
    files = sorted(map(str, local(path).glob("*.jsonl"))) if is_folder else [path]
    return _checked([prompt for file in files for prompt in _read_tiif_file(file, model)], path)


def _read_tiif_file(path: str, model: str) -> Iterable[Prompt]:
    index = 0
    for number, line in enumerate(readers.read_text(path, readers.MAX_LIST_BYTES).splitlines(), 1):
        where = f"line {number} of {path}"
        if not line.strip():
            continue
        fix = "a line must be an object with type, short_description and long_description"
        entry: TiifLine = readers.decode_json(line, TiifLine, where=where, fix=fix)
        if not FOLDER_NAME.fullmatch(entry.type):
            raise FileError(
                f"{where}: the type {short(entry.type)} cannot be the name of a folder; "
                "use letters, digits, _, +, . and -",
                path,
            )
        folder = f"{entry.type}/{model}"
        yield Prompt(f"{folder}/short_description/{index}", entry.short_description, where)
        yield Prompt(f"{folder}/long_description/{index}", entry.long_description, where)
        index += 1


def _checked(prompts: list[Prompt], path: str) -> list[Prompt]:
    """The prompts, of which there are some, each of another name."""
    if not prompts:
        raise FileError(f"{path} has no prompts", path)
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        earlier = first.setdefault(prompt.name, prompt)
        if earlier is not prompt:
            raise FileError(
                f"{prompt.where} and {earlier.where} both name the image {prompt.name}.png; "
                "remove one",
                path,
            )
    return prompts
