"""A page as a reader of HTML sees it."""

from html.parser import HTMLParser

VOID = {"meta", "link", "input", "br", "hr", "img"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps ids, attributes and the text of every section."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.attributes, self.texts, self.tags = [], [], [], {}, []
        self.header = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        result = dict(attrs)
        assert len(result) == len(attrs), f"an attribute twice in {tag}"
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [result["id"]] if "id" in result else []
        if tag not in VOID:
            self.open.append((tag, result.get("id")))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        opened, _ = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>, line {self.getpos()[0]}"

    def handle_data(self, data):
        for tag, name in self.open:
            if tag == "header":
                self.header += data
            if tag == "section":
                self.texts[name] = self.texts.get(name, "") + data
