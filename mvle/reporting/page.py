"""The report as one HTML page that needs nothing beside itself: pictures are data, curves are inline SVG, no script."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import remote
from ..evaluation.tables import likelihood_rows, matching_rows, pixel_rows, retrieval_rows, word_rows
from .curves import Line, chart
from .gather import COLUMNS, Filled, Found, Gathered, Piece, Rebuilt

STYLE = """
:root{--ink:#1d2327;--soft:#66707a;--line:#e3e6e9;--paper:#fff;--wash:#f6f7f8;
--blue:#2563c9;--red:#c2412d;--green:#1f7a4d}
*{box-sizing:border-box}
body{margin:0;background:var(--wash);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.2rem;margin:2.4rem 0 .3rem}
p{margin:.3rem 0 .8rem;max-width:46rem}
.soft{color:var(--soft)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0;padding:0}
.facts div,.card,table{background:var(--paper);border:1px solid var(--line);border-radius:8px}
.facts div{padding:.5rem .75rem}
.facts dt{color:var(--soft);font-size:.78rem}
.facts dd{margin:0;font-weight:600;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:.8rem}
.card{padding:.7rem;margin:.8rem 0}
.charts .card{margin:0;padding:.4rem}
svg{display:block;width:100%;height:auto;font-family:inherit}
svg text{font-size:11px;fill:var(--soft)}
svg .title{font-size:12.5px;font-weight:600;fill:var(--ink)}
svg .grid{stroke:var(--line)}
svg polyline{fill:none;stroke-width:1.7;stroke-linejoin:round}
svg polyline.train{stroke:#a9b4be}
svg polyline.val,svg polyline.true{stroke:var(--blue)}
svg polyline.wrong{stroke:var(--red)}
svg polyline.other{stroke:var(--green)}
svg circle.train{fill:#a9b4be}
svg circle.val,svg circle.true{fill:var(--blue)}
svg circle.wrong{fill:var(--red)}
svg circle.other{fill:var(--green)}
svg .key{font-weight:600}
svg .key.train{fill:#87939e}
svg .key.val,svg .key.true{fill:var(--blue)}
svg .key.wrong{fill:var(--red)}
svg .key.other{fill:var(--green)}
.scroll{overflow-x:auto;margin:.8rem 0}
table{border-collapse:separate;border-spacing:0;width:100%;font-variant-numeric:tabular-nums;font-size:.93rem}
th,td{padding:.38rem .7rem;text-align:right;border-top:1px solid var(--line);white-space:nowrap}
tr:first-child th{border-top:0;color:var(--soft);font-weight:600;font-size:.82rem;white-space:normal}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:10rem}
.row{display:grid;grid-template-columns:repeat(5,1fr);gap:.4rem;max-width:44rem}
.row figure{margin:0}
.row figcaption{font-size:.74rem;color:var(--soft);line-height:1.25;min-height:2.5em;display:flex;align-items:end}
img{display:block;width:100%;height:auto;border-radius:4px;background:#888}
.pixels img{image-rendering:pixelated}
.said{margin:.5rem 0 0;font-size:.9rem}
.said b{font-weight:600}
.fill,.found{display:grid;grid-template-columns:6rem 1fr;gap:.9rem;align-items:start}
.fill p,.found p{margin:.1rem 0 .4rem}
.gap{background:#eef2f7;border-radius:4px;padding:0 .25em;font-weight:600}
.ok{color:var(--green);font-weight:600}
.no{color:var(--red);font-weight:600}
ol{margin:0;padding-left:1.3rem}
.three{display:grid;grid-template-columns:repeat(3,minmax(0,7rem));gap:.5rem;margin-top:.5rem}
.three img{border:3px solid transparent}
.three img.right{border-color:var(--green)}
footer{margin-top:3rem;color:var(--soft);font-size:.85rem}
@media(max-width:32rem){
.fill,.found{grid-template-columns:4.5rem 1fr}
.row{gap:.25rem}
.row figcaption{font-size:.66rem}
}
"""


def page(
    title: str,
    facts: Sequence[tuple[str, str]],
    rows: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Any],
    shown: Gathered,
    ratio: float,
) -> str:
    """The whole page. rows: of metrics.jsonl; figures: of evaluation.json ({}: none yet); ratio: share masked in the
    pictures."""
    sections = [
        heading(title, facts),
        curves_section(rows),
        tables_section(figures),
        rebuilt_section(shown.rebuilt, ratio),
        filled_section(shown.filled),
        found_section(shown.captions_found, shown.images_found),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n<footer>Made by mvle.report. Pairs on this page are the first of the split, not picked.</footer>"
        "</main></body></html>\n"
    )


def heading(title: str, facts: Sequence[tuple[str, str]]) -> str:
    """Title and the facts of the run."""
    boxes = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts)
    return f'<h1>{html.escape(title)}</h1><dl class="facts">{boxes}</dl>'


# ---- curves and tables ----------------------------------------------------------------------------------------------


def curves_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Losses of training and validation, and how the picture comes to follow the caption."""

    def points(kind: str, name: str) -> list[tuple[float, float]]:
        return [(row["step"], row[name]) for row in rows if row["kind"] == kind and row.get(name) is not None]

    names = {
        "loss": "all losses, weighted",
        "mim": "masked pixels (MIM)",
        "mlm": "masked words (MLM), nats",
        "itc": "contrast (ITC), nats",
        "itm": "matching (ITM), nats",
    }
    charts = []
    for name, label in names.items():
        lines = [
            Line("training", "train", points("train", name)),
            Line("validation", "val", points("val", f"val_{name}")),
        ]
        charts.append(chart(label, lines))
    gap = [
        Line("true caption", "true", points("val", "val_mim_true")),
        Line("wrong caption", "wrong", points("val", "val_mim_wrong")),
    ]
    charts.append(chart("masked pixels, |difference|", gap))
    recall = [
        Line("to caption", "true", points("val", "val_r1_image_to_text")),
        Line("to image", "other", points("val", "val_r1_text_to_image")),
    ]
    charts.append(chart("R@1 on validation", recall, from_zero=True))
    cards = "".join(f'<div class="card">{c}</div>' for c in charts if c)
    return f'<h2>Training</h2><div class="charts">{cards}</div>' if cards else ""


def table(rows: Sequence[Sequence[str]]) -> str:
    """First row = heads."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def tables_section(figures: Mapping[str, Any]) -> str:
    """evaluation.json."""
    if not figures:
        return '<h2>Figures</h2><p class="soft">Not evaluated yet: python -m mvle.evaluate all RUN</p>'
    parts = []
    if "retrieval" in figures:
        parts.append(table(retrieval_rows(figures["retrieval"])))
    if "itm" in figures:
        parts.append(table(matching_rows(figures["itm"])))
    conditional = figures.get("conditional", {})
    if "mlm" in conditional:
        parts.append(table(word_rows(conditional["mlm"])))
    if "mim" in conditional:
        parts.append(table(pixel_rows(conditional["mim"])))
    if likelihoods := likelihood_rows(conditional):
        parts.append(table(likelihoods))
    about = (
        f"{figures['pairs']} images of {remote.shown(' '.join(figures['data']))}, at step "
        f"{figures['step']}. A model that ignores its partner scores the same with a true and with a wrong one."
    )
    return f'<h2>Figures</h2><p class="soft">{html.escape(about)}</p>' + "".join(parts)


# ---- pictures and words ---------------------------------------------------------------------------------------------


def picture(pixels: NDArray[np.uint8], alt: str, style: str = "") -> str:
    """An <img> that holds its own PNG."""
    data = base64.b64encode(png_bytes(pixels)).decode()
    kind = f' class="{style}"' if style else ""
    return f'<img{kind} alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def png_bytes(pixels: NDArray[np.uint8]) -> bytes:
    """uint8 [height, width, 3] as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def crisp(pixels: NDArray[np.uint8]) -> str:
    """Small pictures keep their pixels when a page enlarges them."""
    return " pixels" if pixels.shape[0] <= 96 else ""


def rebuilt_section(rebuilt: Sequence[Rebuilt], ratio: float) -> str:
    """Rows image | masked | rebuilt three ways."""
    if not rebuilt:
        return ""
    cards = []
    for one in rebuilt:
        figures = "".join(
            f"<figure><figcaption>{name}</figcaption>{picture(p, name)}</figure>"
            for name, p in zip(COLUMNS, one.pictures, strict=True)
        )
        cards.append(
            f'<div class="card{crisp(one.image)}"><div class="row">{figures}</div>'
            f'<p class="said"><b>its caption</b> {html.escape(one.caption)}<br>'
            f"<b>another caption</b> {html.escape(one.another_caption)}</p></div>"
        )
    about = (
        f"{ratio:.0%} of each image is masked (grey) and rebuilt from the rest and a caption: its own, then that of "
        "another pair. In the last column the whole image was masked: all of it comes from the caption."
    )
    return f"<h2>Pictures from captions</h2><p class='soft'>{html.escape(about)}</p>" + "".join(cards)


def filled_section(filled: Sequence[Filled]) -> str:
    """Captions with masked words and the model's words."""
    if not filled:
        return ""
    cards = []
    for one in filled:
        lines = (
            ("", "".join(shaded(piece) for piece in one.pieces)),
            ("with the image: ", answers(one.pieces, "seeing")),
            ("without it: ", answers(one.pieces, "blind")),
        )
        text = "".join(f'<p><span class="soft">{label}</span>{line}</p>' for label, line in lines)
        cards.append(f'<div class="card fill{crisp(one.image)}">{picture(one.image, "image")}<div>{text}</div></div>')
    about = "Shaded words were masked; below, what the model put there, with the image and without any."
    return f'<h2>Words from images</h2><p class="soft">{about}</p>' + "".join(cards)


def shaded(piece: Piece) -> str:
    """A stretch of the caption; of a masked one the word is shaded, the space before it is not."""
    if not piece.masked:
        return html.escape(piece.text)
    space = " " if piece.text.startswith(" ") else ""
    return f'{space}<span class="gap">{html.escape(piece.text.strip())}</span>'


def answers(pieces: Sequence[Piece], which: str) -> str:
    """The words put in for the masked ones, green where right."""
    marked = []
    for piece in pieces:
        if piece.masked:
            word = getattr(piece, which)
            style = "ok" if word == piece.text.strip() else "no"
            marked.append(f'<span class="{style}">{html.escape(word) or "&nbsp;"}</span>')
    return " · ".join(marked)


def found_section(captions: Sequence[Found], images: Sequence[Found]) -> str:
    """Retrieval examples, both ways."""
    if not captions and not images:
        return ""
    cards = []
    for one in captions:
        listed = "".join(
            f"<li{' class=ok' if right else ''}>{html.escape(str(caption))}</li>" for caption, right in one.answers
        )
        assert isinstance(one.query, np.ndarray)
        cards.append(
            f'<div class="card found{crisp(one.query)}">{picture(one.query, "query")}<div><ol>{listed}</ol></div></div>'
        )
    for one in images:
        pictures = [(p, right) for p, right in one.answers if isinstance(p, np.ndarray)]
        shown = "".join(picture(p, "answer", "right" if right else "") for p, right in pictures)
        small = crisp(pictures[0][0]) if pictures else ""
        cards.append(f'<div class="card{small}">{html.escape(str(one.query))}<div class="three">{shown}</div></div>')
    about = "The three most similar captions of an image, the three most similar images of a caption; green = right."
    return f'<h2>Retrieval</h2><p class="soft">{about}</p>' + "".join(cards)
