// Gradio pastes by its button alone, which browsers allow on safe origins only: Ctrl+V drops the picture as a file.
() => document.addEventListener("paste", (event) => {
  const input = document.querySelector("#picture input[type=file]");
  if (!input || !event.clipboardData.files.length) return;
  input.files = event.clipboardData.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
})
