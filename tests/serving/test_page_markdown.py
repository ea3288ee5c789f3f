"""Markdown on the chat page: what is rendered, that nothing of it runs, and that streams end as whole texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from page_driver import PageDriver, expect, running_browser
from scripted_server import ScriptedServer, said


@pytest.fixture(scope="module")
def chat() -> Iterator[PageDriver]:
    server = ScriptedServer()
    with running_browser() as browser:
        driver = PageDriver(browser, server)
        yield driver
        driver.close()
    server.close()


# An outline of the nodes that a text becomes: names and text, without the frame around a block of code.
OUTLINE = """
const outline = (node) => {
    if (node.nodeType === Node.TEXT_NODE) return node.data;
    if (node.className === "code") return `<pre ${node.querySelector("span").textContent}>` +
        node.querySelector("code").textContent + "</pre>";
    const name = node.localName + (node.href ? ` ${node.href}` : "") + (node.start > 1 ? ` ${node.start}` : "") +
        (["center", "right", "loose"].includes(node.className) ? `.${node.className}` : "");
    const inner = [...node.childNodes].map(outline).join("");
    return node.className === "table" ? inner : `<${name}>${inner}</${node.localName}>`;
};
"""


def rendered(chat: PageDriver, text: str) -> str:
    """The outline of a text that came as one."""
    script = f"""(text) => {{
        {OUTLINE}
        const parent = document.createElement("div");
        markdown.append(parent, text);
        return [...parent.childNodes].map(outline).join("");
    }}"""
    return chat.page.evaluate(script, text)


INLINE = {
    "*a* **b** ***c*** ~~d~~": "<em>a</em> <strong>b</strong> <em><strong>c</strong></em> <del>d</del>",
    "_a_ __b__ snake_case_name 2*3*4": "<em>a</em> <strong>b</strong> snake_case_name 2<em>3</em>4",
    "**a *b* c** * d * **": "<strong>a <em>b</em> c</strong> * d * **",
    "**bold *both***": "<strong>bold <em>both</em></strong>",
    "`a*b*` `` c`d `` `open": "<code>a*b*</code> <code>c`d</code> `open",
    r"\*a\* \`b\` C:\dir": r"*a* `b` C:\dir",
    "[a *b*](https://x.org/p?q=1)": "<a https://x.org/p?q=1>a <em>b</em></a>",
    "[a](https://x.org/a_(b)) [c](<https://x.org/d e> 'title')": "<a https://x.org/a_(b)>a</a> <a https://x.org/d%20e>c</a>",
    "[a](b) [c] [d](mailto:e@f.g)": "[a](b) [c] [d](mailto:e@f.g)",
    "see https://x.org/a. (http://y.org)": "see <a https://x.org/a>https://x.org/a</a>. (<a http://y.org/>http://y.org</a>)",
    "![a picture](https://x.org/i.png)": "<a https://x.org/i.png>a picture</a>",
    "<https://x.org> a<br>b": "<a https://x.org/>https://x.org</a> a<br></br>b",
}


@pytest.mark.parametrize("text", INLINE)
def test_inline_elements(chat: PageDriver, text: str) -> None:
    """Emphasis by CommonMark's rules, code, escapes, links; what leads nowhere stays as it was written."""
    assert rendered(chat, text) == f"<p>{INLINE[text]}</p>"


BLOCKS = {
    "# A\n## B ##\n#hash\n####### seven": "<h3>A</h3><h4>B</h4><p>#hash\n####### seven</p>",
    "a\nb\n\n\nc": "<p>a\nb</p><p>c</p>",
    "- a\n- b\n  - c\n\n  d": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul><p>d</p></li></ul>",
    "1. a\n   lazy\nline\n2. b": "<ol><li><p>a\nlazy\nline</p></li><li><p>b</p></li></ol>",
    "3) a\n\n4) b": "<ol 3.loose><li><p>a</p></li><li><p>b</p></li></ol>",
    "1. a\n  - b\n2. c": "<ol><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ol>",
    "- a\n\t- b": "<ul><li><p>a</p><ul><li><p>b</p></li></ul></li></ul>",
    "- a\n* b": "<ul><li><p>a</p></li></ul><ul><li><p>b</p></li></ul>",
    "1. a\n   ```sh\n   ls\n     -l\n   ```\n2. b": (
        "<ol><li><p>a</p><pre sh>ls\n  -l</pre></li><li><p>b</p></li></ol>"
    ),
    "```\n<b>\n\n  x\n```\nafter": "<pre text><b>\n\n  x</pre><p>after</p>",
    "````md\n```\nx\n```\n````": "<pre md>```\nx\n```</pre>",
    "~~~py title\nopen": "<pre py>open</pre>",
    "> a\nlazy\n> > b\n\nc": "<blockquote><p>a\nlazy</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "a\n---\nb\n***": "<p>a</p><hr></hr><p>b</p><hr></hr>",
    "| a | b |\n|:-:|--:|\n| *x* | 1 \\| 2 |\n| y |\n\nz": (
        "<table><thead><tr><th.center>a</th><th.right>b</th></tr></thead>"
        "<tbody><tr><td.center><em>x</em></td><td.right>1 | 2</td></tr>"
        "<tr><td.center>y</td><td.right></td></tr></tbody></table><p>z</p>"
    ),
    "a | b\nno table": "<p>a | b\nno table</p>",
    "1986. A year": "<ol 1986><li><p>A year</p></li></ol>",
    "In\n1986. A year": "<p>In\n1986. A year</p>",
    "    indented stays text": "<p>    indented stays text</p>",
}


@pytest.mark.parametrize("text", BLOCKS)
def test_blocks(chat: PageDriver, text: str) -> None:
    """Headings below the page's own, lists, code, quotes, rules and tables."""
    assert rendered(chat, text) == BLOCKS[text]


HOSTILE = """<script>window.hit = 1</script>

<img src=x onerror="window.hit = 2"> **<svg onload=window.hit=3>** <iframe srcdoc="<script>parent.hit=4</script>">

[a](javascript:window.hit=5) [b](JaVaScRiPt&colon;window.hit=6) [c](java\tscript:window.hit=7) [d](data:text/html,x)
[e](<javascript:window.hit=8>) <javascript:window.hit=9> [f](https://x.org/"onmouseover="window.hit=10)
![g](javascript:window.hit=11) [h](vbscript:x) [i](//evil.example) [<img src=x onerror=window.hit=12>](https://x.org)

| <script>window.hit=13</script> | b |
|---|---|
| <img src=x onerror=window.hit=14> | `<b onclick=window.hit=15>` |

```<img/src=x/onerror=window.hit=16>
</code></pre><script>window.hit = 17</script>
```

- <style>* { display: none }</style>
> <a href="javascript:window.hit=18">click</a>

# <form action=https://x.org><input name=q></form>
"""


def test_nothing_that_a_model_writes_runs(chat: PageDriver) -> None:
    """Scripts, event handlers, frames, styles, forms and addresses that are code stay text, and nothing is loaded."""
    asked: list[str] = []
    chat.page.on("request", lambda request: asked.append(request.url))
    chat.server.replies.append(said(*(HOSTILE[at : at + 5] for at in range(0, len(HOSTILE), 5))))
    chat.ask_and_wait(HOSTILE)
    answer = chat.page.locator(".answer .markdown").last
    active = (
        "script, img, svg, iframe, style, form, input, object, embed, [onerror], [onload], [onclick], [onmouseover]"
    )
    assert answer.locator(active).count() == 0
    links = answer.locator("a")
    for number in range(links.count()):
        assert links.nth(number).get_attribute("href").startswith("https://x.org/")
        assert links.nth(number).get_attribute("rel") == "noopener noreferrer"
        assert links.nth(number).get_attribute("target") == "_blank"
    assert links.count() == 3
    expect(answer).to_contain_text("<script>window.hit = 1</script>")
    expect(answer).to_contain_text("[a](javascript:window.hit=5)")
    assert chat.page.evaluate("window.hit") is None
    assert asked == [f"{chat.server.address}v1/chat/completions"]


def test_even_the_page_itself_cannot_run_what_is_put_into_it(chat: PageDriver) -> None:
    """The policy is a second wall: were a text made HTML, the browser would refuse; inline handlers do not run."""
    tried = chat.page.evaluate(
        """() => {
            try { document.createElement("div").innerHTML = "<b>x</b>"; } catch (error) { return error.name; }
        }"""
    )
    assert tried == "TypeError"
    chat.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.append("window.hit = 20");
            document.body.append(script);
        }"""
    )
    assert chat.page.evaluate("window.hit") is None
    assert all("Trusted" in fault for fault in chat.faults)
    chat.faults.clear()


STREAMED = "\n".join(
    [*BLOCKS, "", *INLINE, "", HOSTILE, "- last", "  ```", "  open code", "", "```sh", "more", "``", " "]
)


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_a_stream_ends_as_the_whole_text(chat: PageDriver, size: int) -> None:
    """Whatever the pieces, the nodes are those of the text at once; so they are at every moment in between."""
    script = """([text, size]) => {
        const [streamed, whole] = [document.createElement("div"), document.createElement("div")];
        const stream = new StreamedMarkdown(streamed, () => {});
        const differ = [];
        for (let at = 0; at < text.length; at += size) {
            stream.add(text.slice(at, at + size));
            stream.update();
            if (at % 97 >= size && at + size < text.length) continue;
            if (at + size >= text.length) stream.finish();
            markdown.append((whole.replaceChildren(), whole), text.slice(0, at + size));
            const copy = streamed.cloneNode(true);
            copy.normalize();
            whole.normalize();
            if (!copy.isEqualNode(whole)) differ.push(at);
        }
        return differ;
    }"""
    assert chat.page.evaluate(script, [STREAMED, size]) == []


def test_finished_blocks_are_not_made_again(chat: PageDriver) -> None:
    """A long answer costs what is new in it: earlier nodes stay the same, and code is appended to one text."""
    script = """() => {
        const parent = document.createElement("div");
        const final = [];
        const stream = new StreamedMarkdown(parent, (node) => final.push(node));
        const read = [];
        const block = markdown.block;
        const add = (text) => { stream.add(text); stream.update(); };
        for (let number = 0; number < 200; number += 1) add(`Paragraph ${number}\\n\\n`);
        const [first, count] = [parent.firstChild, parent.childElementCount];
        add("```\\n");
        for (let number = 0; number < 1000; number += 1) add(`line ${number}\\n`);
        const text = parent.lastChild.querySelector("code").firstChild;
        const long = stream.rest.length;
        add("end\\n```\\nafter");
        stream.finish();
        return {
            same: parent.firstChild === first && final[0] === first,
            count, long, lines: text.data.split("\\n").length, final: final.length, last: parent.lastChild.textContent,
        };
    }"""
    expected = {"same": True, "count": 200, "long": 0, "lines": 1001, "final": 202, "last": "after"}
    assert chat.page.evaluate(script) == expected


@pytest.mark.parametrize(
    "text",
    ["*" * 20000, "*a **b " * 5000, "[" * 20000, "[a](" * 8000, "`" * 9 + "` `` ``` " * 4000, "> " * 5000, "- " * 5000,
     "<https://" * 4000, "https://a.b/(" * 3000, "|" * 20000, "~~a " * 8000, "_a" * 10000, "\\" * 20000, "]" * 20000,
     "1. " * 5000, "# " * 9000, " " * 20000 + "x", "![" * 9000 + "](https://x.org)"],
    ids=lambda text: json.dumps(text[:8]),
)  # fmt: skip
def test_a_text_that_repeats_itself_does_not_stop_the_page(chat: PageDriver, text: str) -> None:
    """Models do that. Steps that grow with the square of the text would take minutes here and end by the time-out."""
    shown: Any = chat.page.evaluate(
        """(text) => {
            const parent = document.createElement("div");
            markdown.append(parent, text);
            let [deepest, depth] = [0, 0];
            const walk = (node) => {
                deepest = Math.max(deepest, depth += 1);
                for (const child of node.children) walk(child);
                depth -= 1;
            };
            walk(parent);
            return [parent.textContent.length > 0, deepest];
        }""",
        text,
    )
    has_text, deepest = shown
    assert has_text or set(text) <= set("> -1.#*")
    assert deepest < 120
