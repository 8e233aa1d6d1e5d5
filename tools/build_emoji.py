"""Builds the shipped emoji from the makers' drawings.

    python tools/build_emoji.py path/to/emoji platform/diptych/assets

The input folder holds one Parquet file a maker (`noto`, `fluent3d`, `twemoji`, `openmoji`): PNG bytes of 64 x 64 pixels with names and tags.
The output is, for each maker, a table of `hexcode` and WebP bytes, and one table of names and tags for all. OpenMoji's drawings are under
a share-alike licence and go to a folder of their own, `emoji-openmoji`.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import polars as pl
from PIL import Image

from diptych.pairs.sources.emoji import LANGUAGES, VENDORS, Vendor, vendor_path
from diptych.pairs.write import parquet_bytes

QUALITY = 85
SHARED = ("hexcode", "emoji", "name", "tags", "short_names", "category", "subcategory")


def smaller(png: bytes) -> bytes:
    """The drawing as WebP; transparency is kept without loss."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGBA").save(buffer, "WEBP", quality=QUALITY, alpha_quality=100, method=6)
    return buffer.getvalue()


def names(tables: dict[Vendor, pl.DataFrame]) -> pl.DataFrame:
    """One row an emoji, by hexcode: what all makers' tables agree on."""
    columns = [*SHARED, *(column for code in LANGUAGES if code != "en" for column in (f"name_{code}", f"tags_{code}"))]
    known = [column for column in columns if column in tables["noto"].columns]
    rows = pl.concat([table.select(known) for table in tables.values()]).unique(maintain_order=True).sort("hexcode")
    if rows["hexcode"].n_unique() != rows.height:
        raise SystemExit("The makers' tables disagree about the names of an emoji")
    return rows


def main() -> None:
    """Reads the folder given, writes the assets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawings", type=Path)
    parser.add_argument("assets", type=Path)
    options = parser.parse_args()
    tables = {vendor: pl.read_parquet(options.drawings / f"{vendor}.parquet") for vendor in VENDORS}
    outputs = {"emoji/names.parquet": names(tables)}
    for vendor, table in tables.items():
        drawn = table.sort("hexcode").select(
            "hexcode", image=pl.Series([smaller(png) for png in table.sort("hexcode")["image"]], dtype=pl.Binary)
        )
        outputs[vendor_path(vendor)] = drawn
    for name, frame in outputs.items():
        path = options.assets / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(parquet_bytes(frame))
        print(f"{name}: {frame.height} rows, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
