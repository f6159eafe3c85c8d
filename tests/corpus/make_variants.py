"""Writes tests/corpus/variants: small parquet files of other writers, and what they hold.

    python -m venv venv && venv/bin/pip install pyarrow==26.0.1 duckdb==2.0.0 polars==2.1.0
    venv/bin/python tests/corpus/make_variants.py

`expected.json` holds the names and texts that all of them hold, and by file the columns to read; `rows`
says where they have none of these rows, or all of them without text.
"""

import json
import pathlib

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq

OUT = pathlib.Path(__file__).parent / "variants"
TEXTS = [
    None if i % 7 == 3 else "" if i % 11 == 5 else f"{'é漢🙂 '[: i % 5]}document {i} " + "words of it " * (i % 13)
    for i in range(90)
]
IDS = list(range(100, 190))
EXPECTED = {}


def expect(name, text="text", identifier="id", rows="all"):
    EXPECTED[name] = {"text": text, "id": identifier, "rows": rows}


def arrow(name, table, text="text", identifier="id", **options):
    pq.write_table(table, OUT / f"{name}.parquet", **options)
    expect(f"{name}.parquet", text, identifier)


def table(kind=pa.string(), **more):
    return pa.table({"id": pa.array(IDS), "text": pa.array(TEXTS, kind), **more})


def main():
    OUT.mkdir(exist_ok=True)
    for codec in ["none", "snappy", "gzip", "brotli", "zstd", "lz4"]:
        for version in ["1.0", "2.0"]:
            number = version[0]
            arrow(f"pyarrow-{codec}-v{number}", table(), compression=codec, data_page_version=version, row_group_size=40)
    for encoding in ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"]:
        for codec in ["none", "zstd"]:
            name = f"pyarrow-{encoding.lower().replace('_', '-')}-{codec}"
            options = {"use_dictionary": False, "column_encoding": {"text": encoding, "id": "PLAIN"}, "compression": codec}
            arrow(name, table(), **options, data_page_size=512, write_batch_size=8)
    arrow("pyarrow-large", table(pa.large_string()), store_schema=True)
    arrow("pyarrow-view", table(pa.string_view()))
    arrow("pyarrow-dictionary", table(pa.dictionary(pa.int32(), pa.string())))
    arrow("pyarrow-index-and-checksums", table(), write_page_index=True, write_page_checksum=True, data_page_size=256, write_batch_size=8)
    arrow("pyarrow-dictionary-falls-back", table(), dictionary_pagesize_limit=256, data_page_size=256, write_batch_size=4)

    inner = pa.array([None if t is None else {"text": t, "other": 1} for t in TEXTS])
    outer = pa.array([{"message": {"text": t, "id": i}} if i % 2 else {"message": {"text": t, "id": i}} for i, t in zip(IDS, TEXTS)])
    arrow("pyarrow-struct", pa.table({"id": pa.array(IDS), "message": inner}), text="message.text")
    arrow("pyarrow-struct-deep", pa.table({"a": outer, "z": pa.array(TEXTS)}), text="a.message.text", identifier="a.message.id")
    lists = pa.array([[{"x": j, "y": "z"} for j in range(i % 4)] for i in range(90)])
    arrow("pyarrow-beside-lists", table(lists=lists, maps=pa.array([[(str(i), i)] for i in range(90)], pa.map_(pa.string(), pa.int64()))))
    arrow("pyarrow-dotted-name", table().rename_columns(["id", "a.b"]), text="a.b")

    writer = pq.ParquetWriter(OUT / "pyarrow-empty-row-groups.parquet", table().schema)
    for piece in [table().slice(0, 0), table().slice(0, 50), table().slice(50, 0), table().slice(50)]:
        writer.write_table(piece)
    writer.close()
    expect("pyarrow-empty-row-groups.parquet")
    pq.write_table(table().slice(0, 0), OUT / "pyarrow-empty.parquet")
    expect("pyarrow-empty.parquet", rows="none")
    nulls = pa.table({"id": pa.array(IDS), "text": pa.array([None] * 90, pa.string())})
    pq.write_table(nulls, OUT / "pyarrow-nulls.parquet")
    expect("pyarrow-nulls.parquet", rows="null")

    frame = table()
    connection = duckdb.connect()
    connection.register("frame", frame)
    for version in ["V1", "V2"]:
        name = f"duckdb-{version.lower()}.parquet"
        connection.execute(
            f"COPY (SELECT * FROM frame) TO '{OUT / name}' (FORMAT parquet, PARQUET_VERSION '{version}', COMPRESSION zstd, ROW_GROUP_SIZE 2048)"
        )
        expect(name)
    connection.execute(f"COPY (SELECT id, {{'text': text, 'n': 1}} AS message FROM frame) TO '{OUT / 'duckdb-struct.parquet'}' (FORMAT parquet)")
    expect("duckdb-struct.parquet", text="message.text")
    polars_frame = polars.DataFrame({"id": IDS, "text": TEXTS})
    for codec in ["zstd", "lz4", "uncompressed"]:
        name = f"polars-{codec}.parquet"
        polars_frame.write_parquet(OUT / name, compression=codec, row_group_size=32, data_page_size=256)
        expect(name)
    polars_frame.with_columns(polars.col("text").cast(polars.Categorical)).write_parquet(OUT / "polars-categorical.parquet")
    expect("polars-categorical.parquet")
    expected = {"ids": IDS, "texts": TEXTS, "files": EXPECTED}
    text = json.dumps(expected, ensure_ascii=False, sort_keys=True, indent=0)
    (OUT / "expected.json").write_text(text + "\n")


main()
