"use strict";
// Ask how the payment stands until it has ended, more and more slowly, at most for two hours.
(() => {
  const began = Date.now();
  let pause = 1000;

  const look = async () => {
    const here = document.getElementById("status");
    const answer = await fetch(here.dataset.api);
    if (!answer.ok) return;
    const now = await answer.json();
    if (now.state === here.dataset.state && (now.error || "") === here.dataset.error) return;
    const page = await (await fetch(location.href)).text();
    const fresh = new DOMParser().parseFromString(page, "text/html");
    // attributes and content change in place, so that screen readers hear of it
    const next = fresh.getElementById("status");
    Object.assign(here.dataset, next.dataset);
    here.replaceChildren(...next.childNodes);
    document.title = fresh.title;
    pause = 1000;
  };

  const again = async () => {
    try {
      await look();
    } catch {
      // offline for a moment: the next look will tell
    }
    if (document.getElementById("status").dataset.final === "yes") return;
    if (Date.now() - began > 2 * 3600 * 1000) return;
    pause = Math.min(pause * 1.2, 15000);
    setTimeout(again, pause);
  };

  setTimeout(again, pause);
})();
