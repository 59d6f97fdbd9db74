// Sets the formulas of a page: what arithmatex marked as such, nothing else.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const text = element.textContent.trim();
    katex.render(text.slice(2, -2), element, {
      displayMode: text.startsWith("\\["),
      throwOnError: false, // a formula that cannot be set is shown in red
    });
  }
});
