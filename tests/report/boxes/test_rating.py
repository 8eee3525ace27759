"""The rating page: opened from disk, rated by keyboard, reloaded half-way, saved and read back."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from scfm_circuits import InputError
from scfm_circuits.common.profile import ROOT
from scfm_circuits.interpretability.agreement import agreement_table, rate_table
from scfm_circuits.interpretability.deck import (
    FEATURE,
    QUANTILE,
    RANDOM,
    TOP,
    Card,
    CardContext,
    CardGene,
    CardToken,
    Deck,
    Piece,
    deck_key,
    write_deck,
)
from scfm_circuits.interpretability.ratings import read_ratings
from scfm_circuits.report.boxes.rating import rating_box
from scfm_circuits.report.tables import script_json
from tests.browser import ANSWER, answer_in, opened

HOSTILE = '</script><img src=x onerror="document.title=1"><b>&amp;"'
ANSWERS = "ynuyynnuynyn"
SPELLED = {"y": "Yes", "n": "No", "u": "Unsure"}


def deck() -> Deck:
    def card(i: int) -> Card:
        pieces = (Piece("_CD", 0.0, "CD14"), Piece("14", 2.5 + i, "CD14"), Piece(".", 0.0, None),
                  Piece(HOSTILE, 0.5, HOSTILE))
        return Card(f"c{i + 1:02}", RANDOM if i % 4 == 3 else FEATURE, 1, -1 if i % 4 == 3 else i,
                    -2.0, (CardToken("14", 0.9, 9, 12), CardToken(HOSTILE, 0.1, 1, 7)),
                    (CardGene("CD14", "14", 9, 10), CardGene(HOSTILE, "14", 0, 2)),
                    (CardContext(TOP, 3, pieces), CardContext(QUANTILE, 4, pieces[:2])))

    return Deck("study-1", tuple(card(i) for i in range(len(ANSWERS))))


DRIVER = r"""
const all = (selector) => [...document.querySelectorAll(selector)];
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const press = (key, target = document.body) => target.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const click = (text) => all(".rating button")
  .find((one) => one.textContent.startsWith(text)).click();
const field = (text) => all(".rating label").find((one) => one.textContent.startsWith(text))
  .querySelector("input");
const type = (text, value) => {
  field(text).value = value;
  field(text).dispatchEvent(new Event("input", { bubbles: true }));
};
const status = () => all(".rating-status")[0].textContent;
const title = () => all(".rating-card h2")[0].textContent;
async function until(test) {
  for (let wait = 0; wait < 400 && !test(); wait++) await pause(25);
  if (!test()) throw new Error(`never: ${test}`);
}
// Virtual time does not wait for a file to be read, so nothing here is read from one.
const saved = [];
let given = "";
Blob.prototype.text = async () => given;
window.Blob = function blob(parts) { saved.push(parts.join("")); };
URL.createObjectURL = () => "#saved";
window.confirm = () => true;
/** Answer a card: the next one's title, and whether its top is in the window, however high the last
    one was. */
function rate(key) {
  press(key);
  const { top } = all(".rating-card h2")[0].getBoundingClientRect();
  return [title(), top >= 0 && top < innerHeight / 2];
}
async function first() {
  await until(() => all(".rating-card h2").length);
  const told = { images: all("#rating :is(img, script, b)").length, title: document.title,
    text: all(".rating-card")[0].textContent, strong: all(".rating-card mark").length };
  click("Save answers"); told.nameless = [status(), document.activeElement === field("Your name")];
  type("Your name", "A. B."); press("y", field("Your name")); document.activeElement.blur();
  told.typed = all(".rating-count")[0].textContent;
  click("Save answers"); told.nothing = status();
  press("k"); told.before = status();
  told.tops = [...ANSWERS.slice(0, 5)].map(rate);
  told.said = status();
  press("l"); told.label = document.activeElement === field("What it fires on");
  type("What it fires on", HOSTILE); type("Note", "=1+1");
  press("Escape", field("What it fires on"));
  told.left = document.activeElement !== field("What it fires on");
  told.count = all(".rating-count")[0].textContent;
  return told;
}
async function second() {
  await until(() => all(".rating-card h2").length);
  const told = { title: title(), rater: field("Your name").value, label:
    field("What it fires on").value, count: all(".rating-count")[0].textContent };
  told.tops = [...ANSWERS.slice(5)].map(rate);
  told.end = all(".rating-card")[0].textContent; press("y"); press("j"); told.over = status();
  const mail = all(".rating a").find((one) => one.textContent === "Mail answers");
  mail.addEventListener("click", (event) => event.preventDefault());
  mail.click(); told.mail = decodeURIComponent(mail.href);
  told.strip = all(".rating-strip button").map((one) => one.getAttribute("aria-label"));
  all(".rating-strip button")[0].click();
  press("Y"); press("k");
  told.pressed = all(".rating-answers [aria-pressed=true]").map((one) => one.textContent);
  press("j"); press("k");
  click("Save answers"); told.saved = status();
  [told.csv] = saved;
  click("Clear all"); told.cleared = all(".rating-count")[0].textContent;
  const give = async (text) => {
    given = text;
    const files = new DataTransfer();
    files.items.add(new File([text], "own.csv"));
    const input = all(".rating input[type=file]")[0];
    input.files = files.files;
    input.dispatchEvent(new Event("change"));
    const was = status();
    await until(() => status() !== was);
    return status();
  };
  told.foreign = await give(told.csv.replaceAll("study-1", "study-2"));
  told.unknown = await give(told.csv.replaceAll("c01", "c99"));
  told.wrong = await give("study,card\r\n1,2\r\n");
  told.untouched = all(".rating-count")[0].textContent;
  told.taken = await give(told.csv);
  click("Save answers"); told.again = saved[1];
  told.wide = document.documentElement.scrollWidth <= innerWidth;
  const requests = () => performance.getEntriesByType("resource").map((entry) => entry.name);
  told.requests = requests().filter((one) => !one.startsWith("file:"));
  // One that does leave the page, to see that it would have been noticed.
  new Image().src = "http://elsewhere.invalid/control.png";
  for (let wait = 0; wait < 400 && requests().every((one) => !one.includes("elsewhere")); wait++) {
    await pause(50);
  }
  told.control = requests().filter((one) => one.includes("elsewhere"));
  return told;
}
const said = JSON.parse(localStorage.getItem("driver") ?? "null");
(said ? second() : first()).catch((error) => ({ failed: String(error.stack) })).then((told) => {
  if (!said && !told.failed) {
    localStorage.setItem("driver", JSON.stringify(told));
    location.reload();
    return;
  }
  answered([said, told]);
});
"""


@pytest.fixture(scope="module", params=[1280, 500])
def told(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    folder = tmp_path_factory.mktemp("rating")
    for name in ("rating.js", "evidence.js", "dom.js", "custom.css", "rating.css", "evidence.css"):
        shutil.copy(ROOT / "book" / "_static" / name, folder)
    box = rating_box(write_deck(deck(), folder / "deck.json"))
    driver = (f"const ANSWERS = {script_json(ANSWERS)}; const HOSTILE = {script_json(HOSTILE)};"
              + ANSWER + DRIVER)
    page = folder / "page.html"
    page.write_text(
        '<!doctype html><html><head><meta charset="utf-8"><title>Rate</title>'
        '<meta name="viewport" content="width=device-width">'
        '<link rel="stylesheet" href="custom.css"><link rel="stylesheet" href="rating.css">'
        '<link rel="stylesheet" href="evidence.css"><script src="rating.js"></script>'
        '<script src="evidence.js"></script><script src="dom.js"></script></head><body>'
        f"{box}<script>{driver}</script></body></html>", encoding="utf-8")
    shown = opened(page, "--host-resolver-rules=MAP * ~NOTFOUND", width=request.param,
                   marker='id="rating-deck"', budget=200_000)
    answer = answer_in(shown)
    assert not any("failed" in one for one in answer if one), answer
    return answer


def test_a_card_is_rated_by_keyboard_and_its_text_stays_text(told: Any) -> None:
    first = told[0]
    assert first["images"] == 0 and first["title"] == "Rate" and HOSTILE in first["text"]
    assert "Active on one token in 100." in first["text"] and "9 of 10 (90\xa0%)" in first["text"]
    assert first["strong"] == 3
    assert first["nameless"][1] and "name" in first["nameless"][0]
    # A letter in a field is text, not an answer.
    assert first["typed"] == "0 of 12 answered" and "no answer" in first["nothing"]
    assert first["before"] == "This is the first card."
    assert first["tops"] == [[f"Card {i} of 12", True] for i in range(2, 7)]
    assert first["said"].endswith("for card 5.")
    assert first["label"] and first["left"] and first["count"] == "5 of 12 answered"


def test_a_reload_loses_nothing(told: Any) -> None:
    second = told[1]
    assert second["title"] == "Card 6 of 12" and second["rater"] == "A. B."
    assert second["label"] == HOSTILE and second["count"] == "5 of 12 answered"
    # The last one is followed by the end, at the same place.
    *cards, (_, end_in_view) = second["tops"]
    assert cards == [[f"Card {i} of 12", True] for i in range(7, 13)] and end_in_view


def test_what_is_saved_gives_the_rate_and_the_kappa(told: Any, tmp_path: Path) -> None:
    second = told[1]
    assert "All cards have an answer" in second["end"] and second["pressed"] == ["Yes y"]
    assert second["over"] == "This is the end."
    assert second["mail"].startswith("mailto:?subject=Ratings of study-1&body=study,card,rater")
    assert second["mail"].endswith(second["csv"])
    assert second["strip"][1] == "Card 2, No"
    assert "Saved as study-1-A_B_.csv." in second["saved"]
    key = deck_key(deck())
    (tmp_path / "a.csv").write_text(second["csv"], newline="")
    other = pd.DataFrame({"study": "study-1", "card": key["card"], "rater": "C",
                          "interpretable": ["Yes", "No"] * 6})
    other.to_csv(tmp_path / "b.csv", index=False)
    ratings = read_ratings(tmp_path, "study-1", key)
    own = ratings.table[ratings.table["rater"] == "A. B."].set_index("card")
    assert own["interpretable"].tolist() == [SPELLED[one] for one in ANSWERS]
    assert own.loc["c06", "label"] == HOSTILE and own.loc["c06", "note"] == "'=1+1"
    rates = rate_table(ratings.table).set_index(["source", "rater"])
    for source in (FEATURE, RANDOM):
        answers = own.loc[own["source"] == source, "interpretable"]
        assert rates.loc[(source, "A. B."), "rate"] == (answers == "Yes").mean()
    kappa = cohen_kappa_score(own["interpretable"], ["Yes", "No"] * 6)
    agreement = agreement_table(ratings.table)
    assert agreement.loc[agreement["statistic"] == "Cohen", "kappa"].item() == pytest.approx(kappa)


def test_an_own_file_is_taken_up_and_a_wrong_one_changes_nothing(told: Any) -> None:
    second = told[1]
    assert second["cleared"] == second["untouched"] == "0 of 12 answered"
    assert "study-2" in second["foreign"] and "c99" in second["unknown"]
    assert "lacks the columns rater, interpretable" in second["wrong"]
    assert second["taken"] == "12 answers taken from own.csv."
    assert second["again"] == second["csv"]


def test_nothing_is_fetched_and_nothing_is_wider_than_the_page(told: Any) -> None:
    second = told[1]
    assert second["requests"] == [] and second["control"] and second["wide"]


def test_a_deck_that_is_none(tmp_path: Path) -> None:
    assert rating_box(tmp_path / "deck.json") == "This run has no deck of cards."
    for text in ("", "{", "[]", '{"study": "1"}', '{"study": "1", "cards": []}'):
        (tmp_path / "deck.json").write_text(text)
        with pytest.raises(InputError, match="not a deck of rating cards"):
            rating_box(tmp_path / "deck.json")
    box = rating_box(write_deck(deck(), tmp_path / "deck.json"))
    assert box.count("</script>") == 1 and box.isascii() and "decoy" in box
