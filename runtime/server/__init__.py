"""The service over HTTP: three APIs and a page. Needs the extra `serve`."""
