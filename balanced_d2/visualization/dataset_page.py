"""An inspection as one HTML page that needs no other file: for a browser, also that of a phone."""

import base64
from typing import List, Optional, Sequence, Tuple

import cv2
import numpy as np
from jinja2 import Environment, StrictUndefined

from balanced_d2.analysis.inspection import Inspection
from balanced_d2.utils.files import replacing
from balanced_d2.visualization.crops import Group
from balanced_d2.visualization.dataset_charts import dataset_charts

# Jinja2 comes with PyTorch. Names may be of any script and direction, so each is in a <bdi>.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --text: #1d2126; --quiet: #5a626c; --page: #f6f7f8;
  --card: #ffffff; --line: #dfe3e8; --bad: #b3261e;
  --c0: #3b6ea5; --c1: #c8553d; --c2: #4f9d69; --c3: #8e6bb0; --c4: #a8861a; --c5: #2f8f8e; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ed; --quiet: #a2abb6; --page: #14171b;
  --card: #1e2329; --line: #343b44; --bad: #ff8a80;
  --c0: #6ea3dd; --c1: #e8836c; --c2: #74c28f; --c3: #b796da; --c4: #d9b84a; --c5: #64c3c1; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); overflow-wrap: anywhere;
  font: 16px/1.45 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.1rem; margin: 0 0 .35rem; }
h3 { font-size: .95rem; margin: 1rem 0 .4rem; }
p { margin: 0 0 .7rem; }
.quiet, figcaption { color: var(--quiet); font-size: .875rem; }
.grid { display: grid; gap: 1rem; margin-bottom: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: 1rem; margin-bottom: 1rem; min-width: 0; }
.grid section { margin: 0; }
.totals { display: flex; flex-wrap: wrap; gap: .5rem 1.6rem; margin: 0; padding: 0;
  list-style: none; }
.totals b { display: block; font-size: 1.35rem; line-height: 1.2; }
.row { display: grid; grid-template-columns: minmax(0, 9.5rem) minmax(0, 1fr); gap: 0 .7rem;
  align-items: center; margin-bottom: .45rem; font-size: .875rem; line-height: 1.25; }
.bar { display: grid; grid-template-columns: minmax(0, 1fr) 6.2rem; gap: .5rem;
  align-items: center; }
.bar i { display: block; height: .6rem; min-width: 1px; border-radius: 0 .2rem .2rem 0; }
.bar span { font-variant-numeric: tabular-nums; white-space: nowrap; }
.key i { display: inline-block; width: .7rem; height: .7rem; border-radius: .15rem; }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1rem; }
{% for number in range(6) %}.s{{ number }} { background: var(--c{{ number }}); }
{% endfor %}
@media (max-width: 34rem) { .row { grid-template-columns: minmax(0, 1fr); margin-bottom: .6rem; } }
.crops { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(6.8rem, 1fr)); }
figure { margin: 0; min-width: 0; }
figure img, .none { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  background: var(--page); border-radius: .3rem; }
figcaption { line-height: 1.25; margin-top: .2rem; }
figcaption b { color: var(--text); }
ol, .findings { padding-left: 1.3rem; margin: 0; }
li { margin-bottom: .6rem; }
.totals li { margin: 0; }
.refused { color: var(--bad); }
</style>
</head>
<body>
<main>
<h1>What is imbalanced in
{% for name in splits %}{{ " and " if not loop.first }}<bdi>{{ name }}</bdi>{% endfor %}</h1>
<section>
{% for name, numbers in totals %}
<h3><bdi>{{ name }}</bdi></h3>
<ul class="totals">
{% for value, what in numbers %}<li><b>{{ value }}</b>{{ what }}</li>{% endfor %}
</ul>
{% endfor %}
<p class="quiet" style="margin: .8rem 0 0"><a href="#advice">What follows from these figures</a></p>
</section>
<div class="grid">
{% for chart in charts %}
<section>
<h2>{{ chart.title }}</h2>
<p class="quiet">{{ chart.note }}</p>
{% if chart.series|length > 1 %}
<p class="key quiet">
{% for name in chart.series %}
<span><i class="s{{ loop.index0 % 6 }}"></i> <bdi>{{ name }}</bdi></span>
{% endfor %}
</p>
{% endif %}
{% for label, values, texts in chart.rows %}
<div class="row"><bdi>{{ label }}</bdi><div>
{% for value in values %}
<div class="bar">
<i class="s{{ loop.index0 % 6 }}" style="width: {{ "%.2f"|format(100 * value) }}%"></i>
<span>{{ texts[loop.index0] }}</span></div>
{% endfor %}
</div></div>
{% endfor %}
</section>
{% endfor %}
</div>
{% for title, crops in groups %}
<section>
<h2><bdi>{{ title }}</bdi></h2>
<div class="crops">
{% for label, note, source in crops %}
<figure>
{% if source %}<img alt="{{ label }}" src="{{ source }}">
{% else %}<div class="none"></div>{% endif %}
<figcaption><b><bdi>{{ label }}</bdi></b><br><bdi>{{ note }}</bdi></figcaption>
</figure>
{% endfor %}
</div>
</section>
{% endfor %}
<section>
<h2>Duplicates</h2>
<p class="quiet">{{ duplicates }}</p>
</section>
<section>
<h2>Findings of the data check</h2>
{% for name, of_split in findings.items() %}
<h3><bdi>{{ name }}</bdi></h3>
<ul class="findings">
{% for finding in of_split %}
<li{% if finding.refused %} class="refused"{% endif %}>{{ finding|string }}</li>
{% endfor %}
</ul>
{% else %}
<p>Nothing is wrong in the annotations.</p>
{% endfor %}
</section>
<section id="advice">
<h2>What follows</h2>
<p class="quiet">For training with <bdi>{{ splits[0] }}</bdi> and {{ config }}. Each line rests on
the figure that it begins with; whether AP gains by it, only a training can tell.</p>
{% if advice %}
<ol>
{% for line in advice %}
<li><span class="quiet">{{ line.figure }}:</span><br>{{ line.text }}.</li>
{% endfor %}
</ol>
{% else %}
<p>Nothing: the figures are unremarkable.</p>
{% endif %}
</section>
</main>
</body>
</html>
"""


def write_page(found: Inspection, groups: Sequence[Group], config: str, path: str) -> None:
    """Write an inspection as an HTML page.

    Args:
        groups: see :func:`balanced_d2.visualization.crops.crop_groups`.
        config: what the page calls the config.

    Raises:
        UserError: if the folder cannot be written to.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(_PAGE).render(
        title=f"What is imbalanced in {' and '.join(found.data.splits)}",
        splits=found.data.splits,
        totals=totals(found),
        charts=dataset_charts(found),
        groups=[
            (group.title, [(c.label, c.note, _as_url(c.picture)) for c in group.crops])
            for group in groups
        ],
        duplicates=duplicates(found),
        findings=found.findings,
        advice=found.advice,
        config=config,
    )
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(page)


def totals(found: Inspection) -> List[Tuple[str, List[Tuple[str, str]]]]:
    """The name of each split with its numbers, each as text and what it counts."""
    counts = found.counts
    return [
        (
            name,
            [
                (f"{counts.images[i]:,}", "images"),
                (f"{counts.boxes[i]:,}", "boxes"),
                (f"{np.count_nonzero(counts.class_boxes[i]):,}", "classes"),
                (f"{counts.empty[i]:,}", "images without boxes"),
                (f"{found.data.crowds[i]:,}", "crowds left out"),
            ],
        )
        for i, name in enumerate(found.data.splits)
    ]


def duplicates(found: Inspection) -> str:
    """What is known about duplicates, in one sentence for each split."""
    if found.twins is None:
        return "Not looked for: --images opens the images and compares them."
    sentences = []
    for i, name in enumerate(found.data.splits):
        of_split = found.data.image_splits == i
        elsewhere, within = ((twins[of_split] >= 0).sum() for twins in found.twins)
        sentences.append(
            f"{name}: {elsewhere:,} of {of_split.sum():,} images are nearly the same as one of "
            f"another split, {within:,} as one of their own."
        )
    return " ".join(sentences)


def _as_url(picture: Optional[np.ndarray]) -> str:
    if picture is None:
        return ""
    quality = [cv2.IMWRITE_JPEG_QUALITY, 85]
    content = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), quality)[1]
    return "data:image/jpeg;base64," + base64.b64encode(content.tobytes()).decode()
