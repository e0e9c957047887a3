"""The demo: five small vision tasks, trained here, merged by hubmerge, measured after a round trip through a Hub."""
