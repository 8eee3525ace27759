"""The box of the rating page (`rate.html`), with the deck in it.

The page is static and asks nothing of a server: the deck stands in the page as JSON, `rating.js`
shows a card at a time, answers stay in the browser (localStorage) and leave it as a CSV file that
`ratings.read_ratings` reads.
"""

from pathlib import Path

from scfm_circuits import InputError
from scfm_circuits.common.files import read_json
from scfm_circuits.report.tables import script_json


def rating_box(path: Path) -> str:
    """The HTML that rating.js takes over, for the deck that `write_deck` wrote to `path`.

    A sentence where the run has no deck. The deck's texts (genes, labels) come from strangers: they
    are ASCII JSON without `<`, and the script sets them as text.

    Raises:
        InputError: a file that is no deck.
    """
    if not path.is_file():
        return "This run has no deck of cards."
    deck = read_json(path)
    if not deck.get("cards"):
        raise InputError(f"{path} is not a deck of rating cards; run the chapter on the human "
                         "evaluation again.")
    return (f'<script type="application/json" id="rating-deck">{script_json(deck)}</script>\n\n'
            '<div id="rating" class="rating mathjax_ignore"><p>Rating needs scripts; without them, '
            'fill in <a href="downloads/tables/human_eval_sample.csv">human_eval_sample.csv</a>.'
            "</p></div>")
