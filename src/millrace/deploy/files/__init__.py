"""Files beside the manifests: images, scripts that make clusters, and files for one machine."""
