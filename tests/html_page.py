"""Reads a page as a browser would: its elements, the text in them, its tables."""

from html.parser import HTMLParser


class Elements(HTMLParser):
    """Collects the elements of a page, and the text in each kind of element."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], {}, [""]
        self.rows = []  # of each table, of each row the text of its cells
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "table":
            self.rows.append([])
        elif tag == "tr":
            self.rows[-1].append([])
        elif tag in ("td", "th"):
            self.rows[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.open.pop() != tag:  # elements that have no end tag
            pass

    def handle_data(self, data):
        self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1][-1] += data

    @property
    def tables(self):
        """Of each table its rows, of each row the text of its cells, in plain spaces and dashes."""
        return [[[_plain(cell) for cell in row] for row in rows] for rows in self.rows]

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def _plain(text):
    return " ".join(text.split()).replace("\N{EN DASH}", "-").replace("\N{MINUS SIGN}", "-")
