"use strict";
// The form works without this file. With it: the address is checked while you type, faults show
// without a new page, the button names the amount, and code can be copied.
(() => {
  const form = document.getElementById("card-form");
  if (form) card(form);
  for (const box of document.querySelectorAll(".code")) copyable(box);

  function card(form) {
    const wallet = form.elements.wallet;
    const other = form.elements.other;
    const pay = document.getElementById("pay");
    let asked = 0;

    const amount = () => {
      const chosen = form.elements.amount.value;
      return (chosen === "other" ? other.value : chosen).trim().replace(/^\$/, "");
    };
    const label = () => {
      const usd = amount().replace(/^\d+\.\d$/, "$&0"); // 7.5 reads 7.50
      const whole = /^\d{1,10}(\.\d{1,2})?$/.test(usd);
      pay.textContent = whole ? `Pay $${usd} by card` : "Continue to payment";
    };
    const show = (id, text) => {
      const place = document.getElementById(id);
      place.textContent = text;
      place.hidden = !text;
    };
    const judged = (text, address) => {
      show("wallet-fault", text);
      if (text) wallet.setAttribute("aria-invalid", "true");
      else wallet.removeAttribute("aria-invalid");
      document.getElementById("wallet-shown").textContent = address;
      document.getElementById("wallet-good").hidden = !address;
    };

    // The server knows the checksum rule; true if the address may be used.
    const check = async () => {
      const turn = ++asked;
      const value = wallet.value.trim();
      if (!value) {
        judged("Enter a wallet address.", "");
        return false;
      }
      const answer = await fetch(`${form.dataset.check}?address=${encodeURIComponent(value)}`);
      const body = await answer.json();
      if (turn !== asked) return false; // typed on meanwhile: the later answer counts
      judged(answer.ok ? "" : body.detail, answer.ok ? body.address : "");
      return answer.ok;
    };

    const open = async () => {
      show("form-fault", "");
      show("amount-fault", "");
      if (!(await check())) {
        wallet.focus();
        return;
      }
      const answer = await fetch(form.dataset.api, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ amount_usd: amount(), wallet_address: wallet.value.trim() }),
      });
      const body = await answer.json();
      if (answer.ok) {
        location.assign(body.checkout_url);
        return;
      }
      show(body.code === "invalid_amount" ? "amount-fault" : "form-fault", body.detail);
    };

    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      pay.disabled = true;
      try {
        await open();
      } catch {
        show("form-fault", "The connection failed. Nothing was charged; please try again.");
      }
      pay.disabled = false;
    });
    form.addEventListener("input", label);
    wallet.addEventListener("change", () => check().catch(() => judged("", "")));
    window.addEventListener("pageshow", () => { pay.disabled = false; });
    label();
    if (wallet.value && !wallet.hasAttribute("aria-invalid")) check().catch(() => judged("", ""));
  }

  function copyable(box) {
    if (!navigator.clipboard) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(box.querySelector("code").textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
    box.prepend(button);
  }
})();
