"""Texts that a page or a picture must show as they are, and not run."""

HOSTILE = [
    *("</script><script>hacked = 1</script>", "<img src=x onerror='hacked = 1'>"),
    *('"><svg onload="hacked = 1">', "<a href='javascript:hacked = 1'>a</a>"),
    *("&lt;b&gt;", "$\\frac{1}$", r"\$a$", "_name", "%{x} {0} %s", "a\nb", "\udcff"),
]
"""The last one is a byte of a path that is not UTF-8."""
