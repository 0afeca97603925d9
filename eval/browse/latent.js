"use strict";
// Keys of a latent's page: j and k go on and back, / goes to the table. Inside of a table they are the table's.
addEventListener("keydown", (event) => {
  if (event.target.matches("input[type=search], select") || event.metaKey || event.ctrlKey || event.altKey) return;
  if (!["j", "k", "/"].includes(event.key)) return;
  event.preventDefault();
  if (parent !== window) { parent.postMessage({ key: event.key }, "*"); return; }
  const link = document.querySelector({ j: "a[rel=next]", k: "a[rel=prev]", "/": "nav a.table" }[event.key]);
  if (link) location.href = link.href;
});
