"""The report: run directories in, one page and the figures of a paper out.

read -> panels (what is compared with what) -> verdict (words), figures -> page, static
"""
