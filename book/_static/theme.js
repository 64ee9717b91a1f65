(() => {
  // The theme asks for light or dark at the end of a page; until then it would have no colours at all.
  const page = document.documentElement.dataset;
  if (page.theme === "auto") page.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";

  // Paper is light.
  let onScreen = page.theme;
  addEventListener("beforeprint", () => {
    onScreen = page.theme;
    page.theme = "light";
  });
  addEventListener("afterprint", () => {
    page.theme = onScreen;
  });
})();
