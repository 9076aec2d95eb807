// The official x402 seller for Express with the official facilitator in the same process: every
// request is verified, answered and settled on the chain. What the benchmarks compare with.
//   node seller.mjs PORT RPC_URL SETTLER_KEY PAY_TO
import { x402Facilitator } from "@x402/core/facilitator";
import { toFacilitatorEvmSigner } from "@x402/evm";
import { ExactEvmScheme as FacilitatorScheme } from "@x402/evm/exact/facilitator";
import { ExactEvmScheme as ServerScheme } from "@x402/evm/exact/server";
import { paymentMiddleware, x402ResourceServer } from "@x402/express";
import express from "express";
import { createWalletClient, http, nonceManager, publicActions } from "viem";
import { privateKeyToAccount } from "viem/accounts";
import { baseSepolia } from "viem/chains";

const [port, rpcUrl, key, payTo] = process.argv.slice(2);
const NETWORK = "eip155:84532";

// Polled often, because the chain is local; viem's own nonce manager, because the load is parallel.
const account = privateKeyToAccount(key, { nonceManager });
const client = createWalletClient({
  account,
  chain: baseSepolia,
  transport: http(rpcUrl),
  pollingInterval: 20,
}).extend(publicActions);
const facilitator = new x402Facilitator().register(
  NETWORK,
  new FacilitatorScheme(toFacilitatorEvmSigner(Object.assign(client, { address: account.address }))),
);
const inProcess = {
  verify: (payload, requirements) => facilitator.verify(payload, requirements),
  settle: (payload, requirements) => facilitator.settle(payload, requirements),
  getSupported: async () => facilitator.getSupported(),
};
const server = new x402ResourceServer(inProcess).register(NETWORK, new ServerScheme());

const app = express();
app.disable("x-powered-by");
app.use(
  paymentMiddleware(
    { "POST /v1/echo": { accepts: { scheme: "exact", price: "$0.001", network: NETWORK, payTo } } },
    server,
  ),
);
app.use(express.json({ limit: "1mb" }));
app.post("/v1/echo", (req, res) => res.json({ ok: true, result: "x".repeat(200) }));
app.listen(Number(port), "127.0.0.1");
