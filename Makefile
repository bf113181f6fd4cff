.PHONY: dev
dev:
	cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$(CURDIR)/.venv/bin/python -DPYBIGMODEL_CUDA=$(or $(PYBIGMODEL_CUDA),OFF) >/dev/null
	cmake --build build/dev
	cp -f build/dev/*.so pybigmodel/
