"""One HTML file of what is known of an SAE, which a browser shows without a network."""

from sae_lens_multilayer.report.page import ReportContent, report_html

__all__ = ["ReportContent", "report_html"]
