// The official x402 seller for Express, with somebody else's facilitator over HTTP.
//   node facilitated.mjs PORT FACILITATOR_URL API_KEY PAY_TO
import { HTTPFacilitatorClient } from "@x402/core/server";
import { ExactEvmScheme } from "@x402/evm/exact/server";
import { UptoEvmScheme } from "@x402/evm/upto/server";
import { paymentMiddleware, setSettlementOverrides, x402ResourceServer } from "@x402/express";
import express from "express";

const [port, url, key, payTo] = process.argv.slice(2);
const NETWORK = "eip155:84532";
const USDC = "0x036CbD53842c5426634e7929541eC2318f3dCF7e";

const headers = { Authorization: `Bearer ${key}` };
const facilitator = new HTTPFacilitatorClient({
  url,
  createAuthHeaders: async () => ({ verify: headers, settle: headers, supported: headers }),
});
const server = new x402ResourceServer(facilitator)
  .register(NETWORK, new ExactEvmScheme())
  .register(NETWORK, new UptoEvmScheme());
const byPermit2 = {
  scheme: "exact",
  network: NETWORK,
  payTo,
  price: {
    amount: "10000",
    asset: USDC,
    extra: { name: "USDC", version: "2", assetTransferMethod: "permit2" },
  },
};
const eip2612GasSponsoring = {
  info: { description: "Permits are taken", version: "1" },
  schema: { type: "object" },
};
let served = 0;

const app = express();
app.use(
  paymentMiddleware(
    {
      "GET /paid": { accepts: { scheme: "exact", price: "$0.01", network: NETWORK, payTo } },
      "GET /permit2": { accepts: byPermit2 },
      "GET /sponsored": { accepts: byPermit2, extensions: { eip2612GasSponsoring } },
      "GET /metered/:came": { accepts: { scheme: "upto", price: "$0.05", network: NETWORK, payTo } },
    },
    server,
  ),
);
for (const path of ["/paid", "/permit2", "/sponsored"]) {
  app.get(path, (req, res) => res.json({ served: (served += 1) }));
}
app.get("/metered/:came", (req, res) => {
  setSettlementOverrides(res, { amount: req.params.came });
  res.json({ served: (served += 1) });
});
app.get("/served", (req, res) => res.json({ served }));
app.listen(Number(port), "127.0.0.1");
