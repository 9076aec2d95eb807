// The legacy x402 v1 client, wrapped as its README says, with nothing but a key.
//   node pay_v1.mjs URL PRIVATE_KEY [METHOD] [BODY] [COUNT]
import { createWalletClient, http } from "viem";
import { privateKeyToAccount } from "viem/accounts";
import { baseSepolia } from "viem/chains";
import { wrapFetchWithPayment } from "x402-fetch";
import { argumentsOf, report } from "./answer.mjs";

const { url, key, init, count } = argumentsOf("pay_v1.mjs");
const client = createWalletClient({
  account: privateKeyToAccount(key),
  transport: http(),
  chain: baseSepolia,
});
const fetchWithPay = wrapFetchWithPayment(fetch, client);
for (let n = 0; n < count; n += 1) await report(() => fetchWithPay(url, init));
