"""The page that replays an answer, in a real browser."""

from __future__ import annotations

import re

import pytest

from tests.support.browser import address_of, chromium
from tests.support.waiting import wait_until
from twotower_contract.replay import Replay, Token

PROMPT = "Mia the fox </script> & <b>lived</b>"
BLOCKS = (
    (Token(" by", 1, 0.99), Token(" the", 3, 0.5), Token("\n🦊", 2, 0.8)),
    (Token(" <i>river</i>", 2, None), Token(".", 1, 1.0)),
    (Token(" The", 0, None), Token(" end", 0, None)),  # of a mode that masks nothing
)
SPACE, RIGHT, LEFT, HOME, END = " ", "\ue014", "\ue012", "\ue011", "\ue010"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "replay.html"
    Replay(PROMPT, BLOCKS, "7 tokens in 6 calls").write(path)
    return path


@pytest.fixture(scope="module")
def browser(page):
    with chromium() as browser:
        browser.open(address_of(page))
        yield browser
        assert browser.problems() == []


def shown(browser) -> str:
    return browser.run("return document.querySelector('.board').textContent")


def test_a_page_fetches_nothing(page) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(?!data:)\w", text)
    assert "{{" not in text
    assert text.count("</script>") == 2, "the prompt's own cannot end the data"


def test_each_call_is_a_picture(browser) -> None:
    pictures = [
        ("", "all 3 positions masked"),
        (" by", "block 1 of 3, call 1 of 3: 2 of 3 masked"),
        (" by\n🦊", "block 1 of 3, call 2 of 3: 1 of 3 masked"),
        (" by the\n🦊", "block 1 of 3, call 3 of 3: 0 of 3 masked"),
        (" by the\n🦊.", "block 2 of 3, call 1 of 2: 1 of 2 masked"),
        (" by the\n🦊 <i>river</i>.", "block 2 of 3, call 2 of 2: 0 of 2 masked"),
        (" by the\n🦊 <i>river</i>. The end", "block 3 of 3, call 1 of 1: 0 of 2 masked"),
    ]
    browser.press(HOME)
    for text, where in pictures:
        assert (shown(browser), browser.text(".where")) == (PROMPT + text, where)
        browser.press(RIGHT)
    assert shown(browser) == PROMPT + pictures[-1][0], "nothing comes after the last"
    browser.press(LEFT)
    assert shown(browser) == PROMPT + pictures[-2][0]
    browser.press(HOME)
    assert shown(browser) == PROMPT
    browser.press(END)
    assert shown(browser) == PROMPT + pictures[-1][0]


def test_play_advances_to_the_end_and_pauses(browser) -> None:
    browser.press(HOME)
    browser.run("document.querySelector('.speed').value = '20'")
    browser.press(SPACE)
    assert browser.text(".play") == "Pause"
    wait_until(lambda: browser.text(".play") == "Play")
    assert shown(browser).endswith("The end")
    browser.run("document.querySelector('.play').click()")  # from the beginning again
    wait_until(lambda: browser.text(".play") == "Play")
    assert shown(browser).endswith("The end")


def test_a_token_tells_its_call_and_confidence(browser) -> None:
    browser.press(END)
    browser.run("document.querySelectorAll('.token')[1].click()")
    assert browser.text(".detail") == '" the": committed by call 3, confidence 50.0%'
    browser.run("document.querySelectorAll('.bars button')[1].click()")
    assert browser.text(".where").startswith("block 2 of 3, call 1 of 2")


def test_a_phone_shows_all_of_it(browser) -> None:
    browser.resize(360, 640)
    wide = browser.run("return document.documentElement.scrollWidth")
    assert wide <= 360
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    style = "return getComputedStyle(document.body)"
    light_page = browser.run(f"{style}.backgroundColor")
    browser.devtools("Emulation.setEmulatedMedia", features=dark)
    assert browser.run(f"{style}.backgroundColor") != light_page
    assert browser.run(f"{style}.color") != browser.run(f"{style}.backgroundColor")
