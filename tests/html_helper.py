"""What the pages of site/build.py and the reports of plot.py hold, for their tests."""
from html.parser import HTMLParser
from types import SimpleNamespace

ALONE = ("meta", "link", "img", "br", "hr", "input")  # these have no end tag


class Page(HTMLParser):
    """The elements of a page in the order of their start tags: tag, attributes and text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.source = [], [], path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == [], "tags are not closed"

    def handle_starttag(self, tag, attributes):
        element = SimpleNamespace(tag=tag, attributes=dict(attributes), text="")
        self.elements.append(element)
        self.open += [] if tag in ALONE else [element]

    def handle_endtag(self, tag):
        assert tag in ALONE or self.open.pop().tag == tag, f"{tag} closes another tag"

    def handle_data(self, text):
        for element in self.open:
            element.text += text

    def values(self, *names, tags=None):
        """The values of these attributes, in all elements or in those with one of the tags."""
        return [value for element in self.elements if not tags or element.tag in tags
                for name, value in element.attributes.items() if name in names]
