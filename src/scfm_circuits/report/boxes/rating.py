"""The box of the rating page (`rate.html`), with the deck in it.

The page is static and asks nothing of a server: the deck stands in the page as JSON, `rating.js`
shows a card at a time, answers stay in the browser (localStorage) and leave it as a CSV file that
`ratings.read_ratings` reads.
"""

from pathlib import Path

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
    from scfm_circuits.interpretability.deck import blind, read_deck

    deck = script_json(blind(read_deck(path)))
    return (f'<script type="application/json" id="rating-deck">{deck}</script>\n\n'
            '<div id="rating" class="rating mathjax_ignore"><p>Rating needs scripts; without them, '
            'fill in <a href="downloads/tables/human_eval_sample.csv">human_eval_sample.csv</a>.'
            "</p></div>")
