# The gateway, and as target `devnet` the local chain for trying it.

FROM node:22-slim AS chain-tools
WORKDIR /anvil
COPY anvil/package.json anvil/package-lock.json ./
RUN npm ci --no-audit --no-fund

FROM python:3.13-slim AS gateway
COPY requirements.lock /tmp/
RUN pip install --no-cache-dir --only-binary :all: --require-hashes -r /tmp/requirements.lock
WORKDIR /app
COPY gateway gateway
COPY chain chain
COPY wallet_auth wallet_auth
COPY anvil/*.py anvil/
RUN useradd --system --home /data --create-home farebox && python -m compileall -q .
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1
USER farebox
WORKDIR /data
EXPOSE 8402
ENTRYPOINT ["python", "-m", "gateway.cli"]
CMD ["serve"]

FROM gateway AS devnet
COPY --from=chain-tools /anvil/node_modules /app/anvil/node_modules
CMD ["devnet", "--port", "8545", "--json"]

FROM gateway
