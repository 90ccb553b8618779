"""Tables of figures are those of the cards; a card has what a reader needs to judge it."""

from datetime import date

import pytest

from benchmarks.card_tables import FILES, ROOT, Row, cards, rendered

TABLES = {"README.md": 1, "README.zh.md": 1, "benchmarks/README.md": 2}


@pytest.mark.parametrize("name", FILES)
def test_tables_are_made_from_the_cards(name: str) -> None:
    page = (ROOT / name).read_text()
    assert page.count("<!-- /cards -->") == TABLES[name]
    assert rendered(page) == page, "python -m benchmarks.card_tables writes them"


def test_another_figure_changes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import card_tables as module

    (card,) = [card for card in cards() if (card.model, card.gpu) == ("Qwen2.5-1.5B", "H100")]
    assert [card.ratio(row) for row in card.training] == ["", "1.34", "1.62"]
    slower = [Row(**{**row.__dict__, "tokens_per_second": 79_204}) if row.default else row for row in card.training]
    monkeypatch.setattr(module, "cards", lambda: [module.Card(card.model, card.gpu, slower, card.values)])
    page = rendered("<!-- cards summary -->\n<!-- /cards -->")
    assert "| Qwen2.5-1.5B | H100 | 79,204 | 626 | x 2.00 |\n" in page


def test_a_card_says_when_and_with_what() -> None:
    for card in cards():
        assert {"torch", "transformer-engine", "megatron-core"} <= card.values["versions"].keys()
        assert all(date.fromisoformat(row.date) <= date.today() for row in card.training)
        assert any(row.default for row in card.training)
